"""fio: its job files, its I/O, its reports, on an NVMe queue pair.

``jobfile``, ``options`` read jobs; ``layout`` says where their files are; ``plan``, ``distribution`` decide what I/O
they do; ``engine`` does it on a ``queue``; ``verify`` checks data; ``stats``, ``histogram``, ``record`` count;
``report``, ``report_json`` tell.
"""

from pvfio.workloads.fio.job import Job
from pvfio.workloads.fio.jobfile import JobFileError, parse_job_files, parse_job_text
from pvfio.workloads.fio.options import Notes, build

__all__ = ["Job", "JobFileError", "Notes", "build", "parse_job_files", "parse_job_text"]
