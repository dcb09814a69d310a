/*
 * Ringing an eventfd that somebody else made and shares, perhaps somebody hostile.
 */
#ifndef PVFIO_RING_H
#define PVFIO_RING_H

struct pv_bell;

/* For eventfds whose owner is not to be trusted. NULL: the system has none to give, pv_ring is as good as it gets. */
struct pv_bell *pv_bell_create(void);
/* Waits some milliseconds for the system. */
void pv_bell_destroy(struct pv_bell *bell);
/*
 * One more in the counter; a full one says that it overflowed (POLLERR), as those of Linux's own interrupts. Never waits,
 * whatever the owner does. 0 or -EFAULT. One thread at a time.
 */
int pv_bell_ring(struct pv_bell *bell, int eventfd);

/* One more in the counter; a full one stays full. Never waits while the other side only uses the eventfd. 0 or -EFAULT. */
int pv_ring(int eventfd);

#endif
