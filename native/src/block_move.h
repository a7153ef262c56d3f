/* Moving a request's data between the image and card memory. */
#ifndef MIC_BLOCK_MOVE_H
#define MIC_BLOCK_MOVE_H

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

/* A second thread that takes half of a large request; started by the first one that needs it. */
struct mic_mover;

/* NULL: no memory. */
struct mic_mover *mic_mover_create(void);
void mic_mover_destroy(struct mic_mover *m);
/* Move the whole list from or to `fd` at byte `off`; what lies beyond the end of the file reads as zeros.
 * 0 or the errno. The list is used up. One caller at a time. */
int mic_mover_run(struct mic_mover *m, int fd, struct iovec *iov, unsigned n, off_t off, bool write);

#endif
