/* cffi: begin */
struct pv_mappings;
/* cffi: end */
