/* cffi: begin */
struct pv_dsa;
/* cffi: end */
