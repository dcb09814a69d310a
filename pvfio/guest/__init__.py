"""The guest kernel: hypercall transport, pvIOMMU driver, logical device IDs, PCI, and VFIO's kernel half.

The guest reaches the host through two things it is handed: the hypercall entry point and the vPCI channels.
Not modelled: processes, scheduling, interrupts of the guest's own, kernel drivers other than by name.
"""
