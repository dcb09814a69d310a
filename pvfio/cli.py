"""The command line: ``pvfio dmatest``, ``fio``, ``nvme``, ``serve``, ``dma-map-benchmark``, ``walk``, ``devices``.

Only names, options and exit statuses are here; what a command does is imported when it runs. Exit statuses:
0 done, 1 a test or the machine failed, 2 the request cannot be (one line on standard error says why), 130
interrupted.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pvfio import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="pvfio",
    help="Userspace drivers on emulated devices behind a para-virtualized Hyper-V IOMMU.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Platform(StrEnum):
    """Whose IOMMU is the second stage."""

    intel = "intel"
    amd = "amd"


class MapApi(StrEnum):
    """What dma-map-benchmark maps with."""

    dma = "dma"
    vfio = "vfio"
    pagetable = "pagetable"


class DmaDomain(StrEnum):
    """The kind of domain a device of the kernel is in."""

    strict = "strict"
    lazy = "lazy"
    identity = "identity"


class EngineChoice(StrEnum):
    """Who runs the device's work."""

    inline = "inline"
    thread = "thread"


class ServeLog(StrEnum):
    """What ``serve`` tells on standard error."""

    wire = "wire"


class Completion(StrEnum):
    """How the driver learns that commands are complete."""

    polled = "polled"
    interrupt = "interrupt"
    hybrid = "hybrid"


def _size(text: str, option: str) -> int:
    """Bytes: a number, hexadecimal with 0x, or with K, M or G (powers of 1024)."""
    from pvfio.workloads.parameters import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _address(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an address (try 0x10000000)") from None
    if not 0 <= value < 1 << 64:
        raise typer.BadParameter(f"{text} is not a 64-bit address")
    return value


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pvfio {__version__}")
        raise typer.Exit


PlatformOption = Annotated[Platform, typer.Option(help="Second stage: Intel VT-d or AMD format.")]
EngineOption = Annotated[
    EngineChoice,
    typer.Option(help="Device engine: a native thread, or inline in the caller (deterministic)."),
]
RamOption = Annotated[str, typer.Option(metavar="SIZE", help="Guest memory.")]


@app.callback()
def pvfio(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Userspace drivers on emulated devices behind a para-virtualized Hyper-V IOMMU."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def dmatest(
    context: typer.Context,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Parameters as the kernel's module takes them (channel=dma0chan0 iterations=10 dmatest=1); "
            "they win over options.",
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Copy FILE through the device and check it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --input: write the copy there.")
    ] = None,
    copy_crc: Annotated[
        bool, typer.Option("--copy-crc", help="With --input: COPY_CRC instead of MEMMOVE and CRCGEN.")
    ] = False,
    operation: Annotated[
        str | None, typer.Option(metavar="OP", help="Test this operation of the device; 'list' names them.")
    ] = None,
    bench: Annotated[
        bool,
        typer.Option("--bench", help="Measure against plain C loops; both engines, unless one is given."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
    platform: PlatformOption = Platform.intel,
    engine: EngineOption = EngineChoice.thread,
    devices: Annotated[
        int | None, typer.Option(min=1, max=64, help="Devices; default: those of --channel, or 1.")
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(min=1, help="Channels, that is work queues, a device; default: as many as are used."),
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Use this one (dma0chan0); may be repeated.")
    ] = None,
    max_channels: Annotated[int, typer.Option(min=0, help="Use at most so many; 0: all.")] = 0,
    iterations: Annotated[int, typer.Option(min=0, help="Tests a thread; 0: until interrupted.")] = 1000,
    threads_per_chan: Annotated[int, typer.Option(min=1, help="Threads a channel.")] = 1,
    test_buf_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Test buffer (16K), or chunk of a file (1M).")
    ] = None,
    dmatest: Annotated[int, typer.Option(min=0, max=1, help="0: memcpy, 1: memset.")] = 0,
    polled: Annotated[
        bool | None,
        typer.Option("--polled/--irq", help="How completion is seen; neither: a short poll, then interrupt."),
    ] = None,
    timeout: Annotated[int, typer.Option(metavar="MS", help="For one transfer; -1: none.")] = 3000,
    noverify: Annotated[bool, typer.Option("--noverify", help="Do not verify the data.")] = False,
    norandom: Annotated[bool, typer.Option("--norandom", help="Whole buffers, no random offsets.")] = False,
    alignment: Annotated[int, typer.Option(help="Of offsets and lengths, as a power of 2; -1: none.")] = -1,
    transfer_size: Annotated[str, typer.Option(metavar="SIZE", help="Of every transfer; 0: random.")] = "0",
    seed: Annotated[int | None, typer.Option(min=0, help="Of the random choices.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for every test that passed.")
    ] = False,
    walk: Annotated[bool, typer.Option("--walk", help="Show how the first buffer is translated.")] = False,
    ram: RamOption = "512M",
) -> None:
    """Move random buffers, or a file, through the emulated DSA and verify every byte.

    The last line of each thread has the format of Linux's dmatest.
    """
    from pvfio import cli_dmatest
    from pvfio.workloads.parameters import parse_channel, parse_parameters

    if operation == "list":
        raise typer.Exit(cli_dmatest.list_operations())
    source = context.get_parameter_source("engine")
    given_engine = source is not None and source.name == "COMMANDLINE"
    try:
        options = cli_dmatest.make_options(
            {
                "channel": [parse_channel(name) for name in channel or []],
                "max_channels": max_channels,
                "iterations": iterations,
                "threads_per_chan": threads_per_chan,
                "test_buf_size": None if test_buf_size is None else _size(test_buf_size, "--test-buf-size"),
                "dmatest": bool(dmatest),
                "polled": polled,
                "timeout": timeout,
                "noverify": noverify,
                "norandom": norandom,
                "alignment": alignment,
                "transfer_size": _size(transfer_size, "--transfer-size"),
                "verbose": verbose,
            }
            | parse_parameters(parameters or []),
            seed=seed,
            platform=platform.value,
            engine=engine.value,
            devices=devices,
            channels=channels,
            operation=operation,
            ram=_size(ram, "--ram"),
            input=input,
            output=output,
            copy_crc=copy_crc,
            walk=walk,
            json=json,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if bench:
        from pvfio import cli_bench

        raise typer.Exit(cli_bench.run(options, (engine.value,) if given_engine else ("inline", "thread")))
    raise typer.Exit(cli_dmatest.run(options))


@app.command()
def dma_map_benchmark(
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="The first eight options as words (threads=2 mode=sg); they win."
        ),
    ] = None,
    threads: Annotated[str, typer.Option("--threads", "-t", metavar="N", help="Threads, 1 to 1024.")] = "1",
    seconds: Annotated[
        str, typer.Option("--seconds", "-s", metavar="S", help="How long, at most 300.")
    ] = "20",
    node: Annotated[str, typer.Option("--node", "-n", metavar="N", help="NUMA node; -1: any.")] = "-1",
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            "-b",
            metavar="N",
            help="Of the device's addresses, 20 to 64; 32, or what --mappings need.",
        ),
    ] = None,
    dir: Annotated[
        str,
        typer.Option("--dir", "-d", metavar="DIR", help="0: BIDIRECTIONAL, 1: TO_DEVICE, 2: FROM_DEVICE."),
    ] = "0",
    xdelay: Annotated[
        str, typer.Option("--xdelay", "-x", metavar="NS", help="From map to unmap, at most 10000000.")
    ] = "0",
    granule: Annotated[
        str, typer.Option("--granule", "-g", metavar="N", help="Pages a mapping, or sg entries; 1 to 1024.")
    ] = "1",
    mode: Annotated[
        str, typer.Option("--mode", "-m", metavar="MODE", help="single (0) or sg (1).")
    ] = "single",
    api: Annotated[
        MapApi, typer.Option(help="Map with the DMA API, with VFIO, or in a page table alone.")
    ] = MapApi.dma,
    domain: Annotated[
        DmaDomain | None, typer.Option(help="Of the device, with --api dma.", show_default="strict")
    ] = None,
    mappings: Annotated[int, typer.Option(metavar="N", help="Mappings that stay meanwhile.")] = 0,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Where the time goes, step by step.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the latencies, and their cost beside 1 to N live mappings."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
    platform: PlatformOption = Platform.intel,
    ram: RamOption = "512M",
) -> None:
    """Measure what it takes to map memory for a device and to unmap it, as Linux's dma_map_benchmark does.

    Prints that tool's lines first.
    """
    import time

    began = time.perf_counter()
    from pvfio import cli_dma_map_benchmark

    given = {
        "threads": threads,
        "seconds": seconds,
        "node": node,
        "dir": dir,
        "xdelay": xdelay,
        "granule": granule,
        "mode": mode,
    }
    if bits is not None:
        given["bits"] = bits
    try:
        options = cli_dma_map_benchmark.make_options(
            given,
            parameters or [],
            api=api.value,
            domain=domain and domain.value,
            mappings=mappings,
            breakdown=breakdown,
            plot=plot,
            platform=platform.value,
            ram=_size(ram, "--ram"),
            json=json,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(cli_dma_map_benchmark.run(options, began))


@app.command()
def fio(
    jobfiles: Annotated[
        list[Path] | None, typer.Argument(metavar="JOBFILE...", help="fio job files, as they are.")
    ] = None,
    output_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="normal, json or json+; several with commas.")
    ] = "normal",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The report goes there.")] = None,
    section: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this job; may be repeated.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option for every job, over the files'; may be repeated."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The namespace is this raw image, not memory.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The namespace refuses writes.")] = False,
    size: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Of the namespace in memory; 0: what the jobs need, 256M or more."),
    ] = "0",
    completion: Annotated[
        Completion, typer.Option(help="How completion is seen: a short poll, then interrupt, is hybrid.")
    ] = Completion.hybrid,
    inject: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="A fault of the device (corrupt:opcode=1,lba=77 or delay:times=3,delay=0.1); may be repeated.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of IOPS and latencies (matplotlib).")
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure 4 KiB random I/O against a plain C loop; no job files.")
    ] = False,
    parse_only: Annotated[
        bool, typer.Option("--parse-only", help="Read the job files, run nothing.")
    ] = False,
    platform: PlatformOption = Platform.intel,
    engine: EngineOption = EngineChoice.thread,
    ram: RamOption = "512M",
) -> None:
    """Run fio job files through the NVMe driver on an emulated controller, with fio's reports."""
    from pvfio import cli_fio

    memory = _size(ram, "--ram")
    if bench:
        from pvfio import cli_fio_bench

        others: dict[str, object] = {"a job file": jobfiles, "--output": output, "--section": section}
        others |= {"--option": option, "--image": image, "--read-only": read_only, "--inject": inject}
        for name, given in (others | {"--plot": plot, "--parse-only": parse_only}).items():
            if given:
                raise typer.BadParameter(f"--bench goes without {name}")
        raise typer.Exit(
            cli_fio_bench.run(platform.value, engine.value, memory, json=output_format != "normal")
        )
    if not jobfiles:
        raise typer.BadParameter("name a job file, or --bench")
    formats = tuple(dict.fromkeys(output_format.split(",")))
    if not set(formats) <= set(cli_fio.FORMATS):
        raise typer.BadParameter(
            f"--output-format: one of {', '.join(cli_fio.FORMATS)}, not {output_format!r}"
        )
    options = cli_fio.FioOptions(
        files=jobfiles,
        platform=platform.value,
        engine=engine.value,
        completion=completion.value,
        ram=memory,
        size=_size(size, "--size"),
        image=image,
        read_only=read_only,
        formats=formats,  # type: ignore[arg-type]
        output=output,
        sections=section or (),
        overrides=option or (),
        plot=plot,
        parse_only=parse_only,
        faults=inject or (),
    )
    raise typer.Exit(cli_fio.run(options))


@app.command()
def nvme(
    command: Annotated[
        str,
        typer.Argument(metavar="COMMAND", help="identify, id-ns, smart-log, error-log, fw-log, format, ..."),
    ],
    namespace: Annotated[
        int, typer.Option("--namespace", "-n", min=1, help="The namespace it is about.")
    ] = 1,
    lbaf: Annotated[
        int, typer.Option(min=0, max=63, help="format: the LBA format (0 is 512, 1 is 4096 bytes).")
    ] = 1,
    ses: Annotated[int, typer.Option(min=0, max=2, help="format: secure erase settings.")] = 0,
    pi: Annotated[int, typer.Option(min=0, max=3, help="format: type of protection information.")] = 0,
    feature_id: Annotated[str, typer.Option("--feature-id", "-f", help="get-feature: which one.")] = "0x01",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The namespace is this raw image, not memory.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The namespace refuses writes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="nvme-cli's JSON instead of lines.")] = False,
    platform: PlatformOption = Platform.intel,
    engine: EngineOption = EngineChoice.thread,
) -> None:
    """Ask the emulated NVMe controller, in nvme-cli's words."""
    from pvfio import cli_nvme

    options = cli_nvme.NvmeOptions(
        command=command,
        platform=platform.value,
        engine=engine.value,
        image=image,
        read_only=read_only,
        nsid=namespace,
        lbaf=lbaf,
        ses=ses,
        pi=pi,
        feature=_address(feature_id),
        json=json,
    )
    raise typer.Exit(cli_nvme.run(options))


@app.command()
def walk(
    iova: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IOVA]...", help="What to translate; without: a buffer the driver allocates."
        ),
    ] = None,
    platform: PlatformOption = Platform.intel,
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the buffer mapped there; 2M gives a large page.")
    ] = "4K",
    unmapped: Annotated[bool, typer.Option("--unmapped", help="Map nothing at IOVA: see the fault.")] = False,
    full: Annotated[
        bool, typer.Option("--all", help="Also every entry read to reach the tables of the first stage.")
    ] = False,
    ram: RamOption = "512M",
) -> None:
    """Show how an address of the device becomes an address of memory: IOVA -> GPA -> HPA, level by level."""
    from pvfio import cli_walk

    addresses = [_address(text) for text in iova or []]
    length, memory = _size(size, "--size"), _size(ram, "--ram")
    status = cli_walk.run(addresses, platform.value, length, unmapped=unmapped, full=full, ram=memory)
    raise typer.Exit(status)


@app.command()
def devices(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="BARs, capabilities, group and driver too.")
    ] = False,
    platform: PlatformOption = Platform.intel,
) -> None:
    """List the PCI functions of the default machine, like lspci."""
    from pvfio import cli_devices

    raise typer.Exit(cli_devices.run(platform.value, verbose=verbose))


@app.command()
def serve(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="nvme, dsa or testdev; or use --device.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(metavar="PATH", help="The device's socket.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="nvme: a namespace is this raw file; may be repeated."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="nvme: a namespace in memory (1G without an image).")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="dsa: dsa1.0 or dsa2.0.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="WORD=VALUE", help="Another word of the device (lba=4096)."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND,socket=PATH,...",
            help="A device with its words; may be repeated: all in one process.",
        ),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="OCTAL", help="Permissions of the sockets.")] = "0600",
    log: Annotated[
        ServeLog | None, typer.Option(help="wire: a line for every message, on standard error.")
    ] = None,
) -> None:
    """Serve devices to QEMU and other vfio-user clients, until SIGINT or SIGTERM.

    Words of nvme: image, size, lba, read-only, serial, queues; of dsa: preset; of testdev: intx, vectors. A comma in a
    value of --device is doubled. QEMU: -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"PATH"}}'.
    """
    from pvfio import cli_serve

    try:
        permissions = int(mode, 8)
    except ValueError:
        permissions = -1
    if not 0 <= permissions <= 0o777:
        raise typer.BadParameter(f"--mode: {mode!r} is not octal (0600)")
    words = [("image", str(path)) for path in image or ()]
    words += [(word, value) for word, value in (("size", size), ("preset", preset)) if value is not None]
    for text in option or ():
        word, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"--option: {text!r} is not WORD=VALUE")
        words.append((word, value))
    raise typer.Exit(
        cli_serve.serve(kind, socket, words, device or [], mode=permissions, wire=log is not None)
    )


def main() -> None:
    """The ``pvfio`` command; ends the process with its exit status."""
    sys.exit(_status())


def _status(arguments: list[str] | None = None) -> int:
    try:
        status = app(arguments, standalone_mode=False)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone: say nothing more
        return 1
    except Exception as error:
        # typer keeps its own copy of click in some versions: its usage errors are known by what they can do
        explain = getattr(error, "format_message", None)
        if explain is None:
            if type(error).__name__ == "Abort":
                return 130
            raise
        message = explain()
        if message:
            print(f"pvfio: {message}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
