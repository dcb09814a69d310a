/*
 * Page tables: their life, the checks in front of the algorithm (radix.h), and its instance for each format.
 *
 * Not modelled: what pagetable.h says.
 */
#include "pagetable.h"

#include <stdlib.h>

#include "radix.h"

struct pt_node *pt_node_new(struct pt_table *table, unsigned level)
{
    const struct pt_config *config = &table->config;
    size_t size = sizeof(struct pt_node) + (level > 1 ? PT_ENTRIES * sizeof(struct pt_node *) : 0);
    struct pt_node *node = calloc(1, size);
    if (node == NULL)
        return NULL;
    node->level = (uint8_t)level;
    node->phys = config->alloc_page(config->owner);
    if (node->phys == PV_PHYS_NONE) {
        free(node);
        return NULL;
    }
    node->entries = (_Atomic uint64_t *)(void *)pv_space_ptr(config->space, node->phys, PV_PAGE_SIZE);
    if (node->entries == NULL || (node->phys & ~PT_ADDRESS) != 0) { /* not a page this table could point to */
        config->free_page(config->owner, node->phys);
        free(node);
        return NULL;
    }
    table->tables++;
    return node;
}

static void node_free(struct pt_table *table, struct pt_node *node)
{
    table->config.free_page(table->config.owner, node->phys);
    free(node);
}

static void node_free_tree(struct pt_table *table, struct pt_node *node)
{
    for (unsigned i = 0; node->level > 1 && i < PT_ENTRIES; i++)
        if (node->child[i] != NULL)
            node_free_tree(table, node->child[i]);
    node_free(table, node);
}

static void put_on_list(struct pt_table *table, struct pt_node *node)
{
    node->next = NULL;
    *table->detached_end = node;
    table->detached_end = &node->next;
    table->detached++;
    table->tables--;
}

void pt_node_free(struct pt_table *table, struct pt_node *node)
{
    table->tables--;
    node_free(table, node);
}

void pt_detach(struct pt_table *table, struct pt_node *parent, unsigned index, uint64_t entry)
{
    struct pt_node *node = parent->child[index];
    pt_store(parent, index, entry);
    parent->child[index] = NULL;
    parent->children--;
    put_on_list(table, node);
}

static void set_root(struct pt_table *table, struct pt_node *root)
{
    table->root = root;
    atomic_store_explicit(&table->top, root->phys | root->level, memory_order_release);
}

static unsigned levels_for(uint64_t last)
{
    unsigned level = 1;
    while (level < PT_MAX_LEVELS && last >> pt_item_lg2(level + 1) != 0)
        level++;
    return level;
}

static bool config_is_valid(const struct pt_config *c, unsigned input_bits, unsigned output_bits)
{
    static const uint8_t fewest[] = {4, 3, 1}, most[] = {5, 5, 6};
    if (c->format < PT_X86_64 || c->format > PT_AMDV1)
        return false;
    if (c->alloc_page == NULL || c->free_page == NULL || c->space == NULL)
        return false;
    if (c->levels < fewest[c->format] || c->levels > most[c->format])
        return false;
    if (input_bits <= PV_PAGE_SHIFT || output_bits <= PV_PAGE_SHIFT || output_bits > 52)
        return false;
    return c->format == PT_AMDV1 ? input_bits <= 64 && levels_for(UINT64_MAX >> (64 - input_bits)) >= c->levels
                                 : input_bits <= pt_item_lg2(c->levels + 1);
}

struct pt_table *pt_create(const struct pt_config *config, int *error)
{
    unsigned reach = config->format == PT_AMDV1 ? 64 : pt_item_lg2(config->levels + 1);
    unsigned input_bits = config->input_bits != 0 ? config->input_bits : reach;
    unsigned output_bits = config->output_bits != 0 ? config->output_bits : 52;
    *error = -EINVAL;
    if (!config_is_valid(config, input_bits, output_bits))
        return NULL;
    uint64_t input_last = UINT64_MAX >> (64 - input_bits);
    unsigned levels = config->format == PT_AMDV1 ? levels_for(input_last) : config->levels;
    uint64_t sizes = 0;
    for (unsigned level = 1; level <= levels; level++)
        sizes |= pt_level_sizes(config->format, level);
    sizes &= (2ull << (input_bits < output_bits ? input_bits : output_bits)) - 1;
    if (config->pgsize_bitmap != 0)
        sizes &= config->pgsize_bitmap;
    if (sizes == 0)
        return NULL;
    *error = -ENOMEM;
    struct pt_table *table = calloc(1, sizeof *table);
    if (table == NULL)
        return NULL;
    table->config = *config;
    table->input_last = input_last;
    table->output_last = UINT64_MAX >> (64 - output_bits);
    table->pgsize_bitmap = sizes;
    table->detached_end = &table->detached_first;
    struct pt_node *root = pt_node_new(table, config->levels);
    if (root == NULL) {
        free(table);
        return NULL;
    }
    set_root(table, root);
    *error = 0;
    return table;
}

void pt_destroy(struct pt_table *table)
{
    if (table == NULL)
        return;
    pt_release_detached(table);
    node_free_tree(table, table->root);
    free(table);
}

uint64_t pt_release_detached(struct pt_table *table)
{
    uint64_t released = table->detached;
    struct pt_node *node = table->detached_first;
    while (node != NULL) {
        struct pt_node *next = node->next;
        node_free(table, node);
        node = next;
    }
    table->detached_first = NULL;
    table->detached_end = &table->detached_first;
    table->detached = 0;
    return released;
}

static int put_above(struct pt_table *table, unsigned level)
{
    struct pt_node *made[PT_MAX_LEVELS], *top = table->root;
    unsigned count = 0;
    while (top->level < level) {
        struct pt_node *node = pt_node_new(table, top->level + 1u);
        if (node == NULL) {
            while (count > 0)
                pt_node_free(table, made[--count]);
            return -ENOMEM;
        }
        node->child[0] = top;
        node->children = 1;
        pt_store(node, 0, pt_make_table(PT_AMDV1, node->level, top->phys));
        made[count++] = top = node;
    }
    set_root(table, top);
    return 0;
}

/* amdv1: raises the top until it covers the range and holds its largest page. The old top stays where it is, as the
 * table for addresses from 0 on; an empty one is not worth keeping. */
static int grow(struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t size)
{
    unsigned level = levels_for(iova + size - 1);
    if (iova == 0) { /* only here can a page be as large as all that the levels cover */
        unsigned needed = pt_level_of(pt_best_lg2(table->pgsize_bitmap, iova, phys, size));
        level = needed > level ? needed : level;
    }
    if (level <= table->root->level)
        return 0;
    if (!pt_empty(table->root))
        return put_above(table, level);
    struct pt_node *old = table->root, *root = pt_node_new(table, level);
    if (root == NULL)
        return -ENOMEM;
    set_root(table, root);
    put_on_list(table, old);
    return 0;
}

int pt_check_range(const struct pt_table *table, uint64_t iova, uint64_t size)
{
    uint64_t smallest = table->pgsize_bitmap & -table->pgsize_bitmap;
    if (size == 0)
        return -EINVAL;
    if (size - 1 > UINT64_MAX - iova)
        return -EOVERFLOW;
    if (((iova | size) & (smallest - 1)) != 0)
        return -ENXIO;
    return iova + (size - 1) > table->input_last ? -ERANGE : 0;
}

int pt_map_range(struct pt_table *table, uint64_t iova, uint64_t phys, uint64_t size, uint32_t perm)
{
    int error = pt_check_range(table, iova, size);
    uint64_t smallest = table->pgsize_bitmap & -table->pgsize_bitmap;
    if (error == -EINVAL || error == -EOVERFLOW)
        return error;
    if (perm == 0 || (perm & ~(uint32_t)(PT_READ | PT_WRITE)) != 0)
        return -EINVAL;
    if (error == -ENXIO || (phys & (smallest - 1)) != 0)
        return -ENXIO;
    if (error != 0 || phys > table->output_last || size - 1 > table->output_last - phys)
        return -ERANGE;
    switch (table->config.format) {
    case PT_X86_64:
        return pt_map(PT_X86_64, table, iova, phys, size, perm);
    case PT_VTDSS:
        return pt_map(PT_VTDSS, table, iova, phys, size, perm);
    default:
        error = grow(table, iova, phys, size);
        return error != 0 ? error : pt_map(PT_AMDV1, table, iova, phys, size, perm);
    }
}

int pt_unmap_range(struct pt_table *table, uint64_t iova, uint64_t size, uint64_t *unmapped)
{
    *unmapped = 0;
    int error = pt_check_range(table, iova, size);
    if (error != 0)
        return error;
    uint64_t last = iova + (size - 1), covered = pt_last_of(table->root->level, 0);
    if (iova > covered)
        return 0;
    last = last < covered ? last : covered;
    switch (table->config.format) {
    case PT_X86_64:
        *unmapped = pt_unmap(PT_X86_64, table, iova, last, NULL);
        break;
    case PT_VTDSS:
        *unmapped = pt_unmap(PT_VTDSS, table, iova, last, NULL);
        break;
    default:
        *unmapped = pt_unmap(PT_AMDV1, table, iova, last, NULL);
    }
    return 0;
}

void pt_prefetch(const struct pt_table *table, uint64_t iova, uint32_t step)
{
    const struct pt_node *node = table->root;
    if (iova > table->input_last || iova > pt_last_of(node->level, 0))
        return;
    while (node->level > 2) {
        node = node->child[pt_index(node->level, iova)];
        if (node == NULL)
            return;
    }
    if (node->level == 2) {
        struct pt_node *const *lowest = &node->child[pt_index(2, iova)];
        if (step == 0)
            __builtin_prefetch(lowest);
        if (step == 0 || *lowest == NULL)
            return;
        node = *lowest;
    }
    if (step == 1)
        __builtin_prefetch(node, 1);
    else if (step == 2)
        __builtin_prefetch((const void *)&node->entries[pt_index(1, iova)], 1);
}

uint64_t pt_iova_to_phys(const struct pt_table *table, uint64_t iova)
{
    if (iova > table->input_last || iova > pt_last_of(table->root->level, 0))
        return PT_NONE;
    switch (table->config.format) {
    case PT_X86_64:
        return pt_translate(PT_X86_64, table, iova);
    case PT_VTDSS:
        return pt_translate(PT_VTDSS, table, iova);
    default:
        return pt_translate(PT_AMDV1, table, iova);
    }
}

void pt_decode_entry(int format, uint64_t entry, uint32_t level, struct pt_walk_entry *out)
{
    struct pt_entry e = {0};
    if (level >= 1 && level <= PT_MAX_LEVELS)
        e = pt_decode(format, entry, level);
    out->entry = entry;
    out->addr = e.present ? e.addr : 0;
    out->level = (uint8_t)level;
    out->present = e.present;
    out->leaf = e.present && e.leaf;
    out->perm = e.present ? e.perm : 0;
    out->size_lg2 = e.size_lg2;
    out->reserved = e.present && e.reserved;
}

uint64_t pt_encode_leaf(int format, uint32_t level, uint32_t size_lg2, uint64_t phys, uint32_t perm)
{
    if (level < 1 || level > PT_MAX_LEVELS || size_lg2 > 63 || !(pt_level_sizes(format, level) >> size_lg2 & 1))
        return 0;
    return pt_make_leaf(format, level, size_lg2, phys, perm);
}

uint64_t pt_encode_table(int format, uint32_t level, uint64_t phys)
{
    return level < 2 || level > PT_MAX_LEVELS ? 0 : pt_make_table(format, level, phys);
}

uint32_t pt_walk(const struct pt_table *table, uint64_t iova, struct pt_walk_entry out[PT_MAX_LEVELS])
{
    uint64_t top = pt_top(table), page = top & PT_ADDRESS;
    uint32_t count = 0;
    unsigned level = top & 7;
    if (iova > table->input_last || iova > pt_last_of(level, 0))
        return 0;
    for (;;) {
        _Atomic uint64_t *entries = (_Atomic uint64_t *)(void *)pv_space_ptr(table->config.space, page, PV_PAGE_SIZE);
        if (entries == NULL) /* a scribbled entry led out of memory; it is the last one in out */
            return count;
        struct pt_walk_entry *step = &out[count++];
        step->table = page;
        step->index = pt_index(level, iova);
        uint64_t entry = atomic_load_explicit(&entries[step->index], memory_order_acquire);
        pt_decode_entry(table->config.format, entry, level, step);
        if (!step->present || step->leaf || step->reserved)
            return count;
        page = step->addr;
        level--;
    }
}

uint64_t pt_top(const struct pt_table *table)
{
    return atomic_load_explicit(&table->top, memory_order_acquire);
}

uint64_t pt_pgsize_bitmap(const struct pt_table *table)
{
    return table->pgsize_bitmap;
}

void pt_get_stats(const struct pt_table *table, struct pt_stats *out)
{
    *out = (struct pt_stats){.tables = table->tables, .detached = table->detached};
}

uint32_t pt_best_pgsize_lg2(uint64_t pgsize_bitmap, uint64_t iova, uint64_t phys, uint64_t size)
{
    return size == 0 ? 0 : pt_best_lg2(pgsize_bitmap, iova, phys, size);
}
