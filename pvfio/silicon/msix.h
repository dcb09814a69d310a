/*
 * A function's MSI-X: the vector table, pending bits, and sending (PCI Local Bus 3.0 section 6.8.2).
 *
 * Any engine thread may fire a vector while the driver rewrites the table.
 */
#ifndef PVFIO_MSIX_H
#define PVFIO_MSIX_H

#include "bus.h"

/* cffi: begin */
struct pv_msix;

struct pv_msix *pv_msix_create(struct pv_bus *bus, uint32_t vectors);
struct pv_msix *pv_msix_get(struct pv_msix *msix);
/* Drops a reference (the creator's, or one of get's); the last one frees it. */
void pv_msix_destroy(struct pv_msix *msix);
/* Message Control bits 15 and 14. */
void pv_msix_control(struct pv_msix *msix, int enable, int function_mask);
/* The table (16 bytes a vector) and the PBA (a bit a vector), 4- and 8-byte accesses; other sizes or offsets: -EINVAL. */
int pv_msix_table_read(struct pv_msix *msix, uint64_t offset, uint32_t size, uint64_t *value);
int pv_msix_table_write(struct pv_msix *msix, uint64_t offset, uint32_t size, uint64_t value);
int pv_msix_pba_read(struct pv_msix *msix, uint64_t offset, uint32_t size, uint64_t *value);
/* 0 sent, 1 pending (masked), -ENOENT disabled, -EINVAL no such vector, -EFAULT message not accepted. */
int pv_msix_fire(struct pv_msix *msix, uint32_t vector);
void pv_msix_reset(struct pv_msix *msix);
/* cffi: end */

#endif
