/* CRC-32C (polynomial 0x11EDC6F41, reflected), without initial or final inversion. */
#ifndef PVFIO_DSA_CRC32C_H
#define PVFIO_DSA_CRC32C_H

#include <stdint.h>

/* cffi: begin */
uint32_t dsa_crc32c(uint32_t crc, const uint8_t *data, uint64_t n);
/* The bits of every data byte taken from high to low. */
uint32_t dsa_crc32c_mirrored(uint32_t crc, const uint8_t *data, uint64_t n);
uint32_t dsa_reverse32(uint32_t value);

/* The ways dsa_crc32c chooses from. streams: only where dsa_crc32c_has_streams; fold: only where dsa_crc32c_can_fold, n a
 * multiple of 256 and not 0. */
uint32_t dsa_crc32c_portable(uint32_t crc, const uint8_t *data, uint64_t n);
uint32_t dsa_crc32c_streams(uint32_t crc, const uint8_t *data, uint64_t n);
uint32_t dsa_crc32c_fold(uint32_t crc, const uint8_t *data, uint64_t n);
int dsa_crc32c_has_streams(void);
int dsa_crc32c_can_fold(void);
/* cffi: end */

#endif
