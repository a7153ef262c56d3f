/* A backend in the style of the character device: a block for ADD_DEVICE, then COPY_DESC. It answers each
 * request of 4 bytes with the same 4 bytes plus one. Checks the errors of VOP 6 on the way. */
#include <errno.h>
#include <mic_vop.h>
#include <stdio.h>
#include <string.h>

#define CHECK(what)                                                                                          \
	do {                                                                                                 \
		if (!(what)) {                                                                               \
			fprintf(stderr, "%d: %s (%s)\n", __LINE__, #what, strerror(errno));                  \
			return 1;                                                                            \
		}                                                                                            \
	} while (0)

static int copy(struct mic_vop *f, unsigned char *data, unsigned len, int last)
{
	struct iovec iov;
	struct mic_copy_desc c;

	iov.iov_base = data;
	iov.iov_len = len;
	memset(&c, 0, sizeof c);
	c.iov = (uint64_t)(uintptr_t)&iov;
	c.iovcnt = 1;
	c.update_used = (uint8_t)last;
	return mic_vop_ioctl(f, MIC_VIRTIO_COPY_DESC, &c) < 0 ? -1 : (int)c.out_len;
}

int main(int argc, char **argv)
{
	struct {
		struct mic_device_desc desc;
		struct mic_vqconfig vq;
		uint64_t features[2];
		uint8_t config[1];
	} block;
	unsigned char data[4];
	struct mic_vop *f;
	int served = 0;

	if (argc < 2)
		return 2;
	CHECK(!mic_vop_open("/nonexistent/vop.sock") && errno == ENOENT);
	f = mic_vop_open(argv[1]);
	CHECK(f);
	mic_vop_dma(f, argc > 2);
	CHECK(copy(f, data, 4, 0) < 0 && errno == EINVAL);
	CHECK(mic_vop_wait(f, 0, -1) < 0 && errno == EINVAL);
	CHECK(mic_vop_ioctl(f, 12345, NULL) < 0 && errno == ENOTTY);
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_ADD_DEVICE, (void *)8) < 0 && errno == EFAULT);
	memset(&block, 0, sizeof block);
	block.desc.type = 42;
	block.desc.num_vq = 1;
	block.desc.feature_len = 8;
	block.desc.config_len = 1;
	block.vq.num = 3;
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_ADD_DEVICE, &block) < 0 && errno == EINVAL);
	block.vq.num = 8;
	block.features[0] = (uint64_t)1 << MIC_VIRTIO_F_VERSION_1;
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_ADD_DEVICE, &block) == 0);
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_ADD_DEVICE, &block) < 0 && errno == EBUSY);
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_COPY_DESC, (void *)8) < 0 && errno == EFAULT);
	CHECK(mic_vop_ioctl(f, MIC_VIRTIO_CONFIG_CHANGE, (void *)8) < 0 && errno == EFAULT);
	while (served < 3 && mic_vop_wait(f, 20000, -1) > 0) {
		while (copy(f, data, 4, 0) == 4) {
			for (int i = 0; i < 4; i++)
				data[i]++;
			CHECK(copy(f, data, 4, 1) == 4);
			served++;
		}
	}
	CHECK(served == 3);
	while (mic_vop_wait(f, -1, 0) != MIC_VOP_OTHER) /* the test looks at the counters, then closes our stdin */
		;
	mic_vop_close(f);
	return 0;
}
