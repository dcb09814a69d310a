/* cffi: begin */
#define PT_X86_64 0
#define PT_VTDSS 1
#define PT_AMDV1 2

#define PT_READ 1
#define PT_WRITE 2
/* cffi: end */
