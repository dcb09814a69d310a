/* CRC-16/T10-DIF (polynomial 0x8BB7, high bits first), without inversions (SCSI SBC-3 4.22.4). */
#ifndef PVFIO_CRC16_T10_H
#define PVFIO_CRC16_T10_H

#include <stdint.h>

/* cffi: begin */
uint16_t pv_crc16_t10(uint16_t crc, const uint8_t *data, uint64_t n);
/* Without 512-bit instructions, and without any but the usual ones. */
uint16_t pv_crc16_t10_narrow(uint16_t crc, const uint8_t *data, uint64_t n);
uint16_t pv_crc16_t10_portable(uint16_t crc, const uint8_t *data, uint64_t n);
/* cffi: end */

#endif
