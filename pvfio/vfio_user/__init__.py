"""vfio-user: devices over a Unix socket, in both directions.

``server`` puts a device of pvfio behind a socket for QEMU and others, ``client`` is a backend of the VFIO API for a
device that somebody else serves; ``channel`` moves messages, ``messages`` says what is in them. Importing the package
imports none of them. Not modelled: migration, twin sockets, ioeventfds and ioregionfds, other transports.
"""
