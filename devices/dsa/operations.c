/*
 * The table of operations. Adding one: a file with its `struct dsa_op`, a line here, a declaration in dsa_private.h.
 */
#include "dsa_private.h"

static const struct dsa_op *const operations[DSA_OPCODES] = {
    [DSA_OPCODE_NOOP] = &dsa_op_noop,
    [DSA_OPCODE_BATCH] = &dsa_op_batch,
    [DSA_OPCODE_DRAIN] = &dsa_op_drain,
    [DSA_OPCODE_MEMMOVE] = &dsa_op_memmove,
    [DSA_OPCODE_MEMFILL] = &dsa_op_memfill,
    [DSA_OPCODE_COMPARE] = &dsa_op_compare,
    [DSA_OPCODE_COMPVAL] = &dsa_op_compval,
    [DSA_OPCODE_CR_DELTA] = &dsa_op_cr_delta,
    [DSA_OPCODE_AP_DELTA] = &dsa_op_ap_delta,
    [DSA_OPCODE_DUALCAST] = &dsa_op_dualcast,
    [DSA_OPCODE_TRANSL_FETCH] = &dsa_op_transl_fetch,
    [DSA_OPCODE_CRCGEN] = &dsa_op_crcgen,
    [DSA_OPCODE_COPY_CRC] = &dsa_op_copy_crc,
    [DSA_OPCODE_DIF_CHECK] = &dsa_op_dif_check,
    [DSA_OPCODE_DIF_INS] = &dsa_op_dif_ins,
    [DSA_OPCODE_DIF_STRP] = &dsa_op_dif_strp,
    [DSA_OPCODE_DIF_UPDT] = &dsa_op_dif_updt,
    [DSA_OPCODE_DIX_GEN] = &dsa_op_dix_gen,
    [DSA_OPCODE_CFLUSH] = &dsa_op_cflush,
};

const struct dsa_op *dsa_op(uint32_t opcode)
{
    return opcode < DSA_OPCODES ? operations[opcode] : NULL;
}

void pv_dsa_opcodes(uint64_t opcap[4])
{
    for (uint32_t i = 0; i < 4; i++)
        opcap[i] = 0;
    for (uint32_t i = 0; i < DSA_OPCODES; i++)
        if (operations[i])
            opcap[i / 64] |= 1ull << i % 64;
}
