/* The plain loop: 4 KiB copies from random blocks of one memory to the slots of another, in turn. */
#include <stdint.h>
#include <string.h>

void random_copies(uint8_t *to, uint64_t slots, const uint8_t *from, const uint64_t *blocks, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        memcpy(to + i % slots * 4096, from + blocks[i] * 4096, 4096);
}
