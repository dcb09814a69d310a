/*
 * Ringing an eventfd that somebody else made and shares, perhaps somebody hostile.
 */
#ifndef PVFIO_RING_H
#define PVFIO_RING_H

/* One more in the counter; a full one stays full. 0 or -EFAULT. Never waits while the other side only uses the eventfd. */
int pv_ring(int eventfd);

#endif
