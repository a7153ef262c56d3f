/* The yardstick of virtio-net: one thread, one buffer, two TAPs. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "mic/net.h"
#include "net_end.h"

#define BURST 64

/* Move up to BURST frames; what the other side refuses is dropped, as by any wire. */
static void move(int from, int to, uint8_t *buf, size_t cap)
{
	for (int i = 0; i < BURST; i++) {
		ssize_t n = read(from, buf, cap);

		if (n <= 0)
			return;
		(void)!write(to, buf, (size_t)n);
	}
}

int mic_net_bridge(int tap_a, int tap_b, int stop_fd)
{
	const int fds[3] = {stop_fd, tap_a, tap_b};
	size_t cap = MIC_NET_FRAME_MAX + MIC_NET_HDR_FULL;
	uint8_t *buf = malloc(cap);
	int ready = 0;

	if (!buf)
		return -ENOMEM;
	while (!(ready & 1)) {
		ready = mic_wait_fds(fds, 3, -1);
		if (ready < 0 && ready != -EINTR)
			break;
		if (ready < 0)
			ready = 0;
		if (ready & 2)
			move(tap_a, tap_b, buf, cap);
		if (ready & 4)
			move(tap_b, tap_a, buf, cap);
	}
	free(buf);
	return ready < 0 ? ready : 0;
}
