/*
 * The wire structures for C: the headers beside this one are plain cdef text, and this is where they get
 * their include guard, their integer types and their packing.
 */
#ifndef PVFIO_ABI_H
#define PVFIO_ABI_H

#include <stddef.h>
#include <stdint.h>

#pragma pack(push, 1)
#include "hyperv.h"
#include "vfio.h"
#include "iommufd.h"
#include "pci.h"
#include "dsa.h"
#include "nvme.h"
#include "vfio_user.h"
#pragma pack(pop)

#endif
