/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ferrydev: a VFIO device that migrates, for tests
 *
 * An mdev device with all of VFIO migration v2: STOP_COPY, P2P, PRE_COPY,
 * PRECOPY_INFO with REINIT, MIG_DATA_SIZE, DMA logging and poll(). There is no
 * hardware: the PCI function is emulated here, DMA is vfio_dma_rw().
 *
 *   main.c       module, mdev, sysfs, vfio_device_ops
 *   function.c   configuration space, BARs, registers
 *   irq.c        eventfds: INTx and MSI-X
 *   work.c       what the device does by itself: DMA, dirtying its state
 *   dma_log.c    which pages it wrote
 *   state.c      the state that migrates, and its digest
 *   migration.c  the migration state machine, reset, sizes
 *   data_file.c  the data_fd: read, write, poll, PRECOPY_INFO
 *   saver.c      what a saving session has to send, and how it is counted
 *   loader.c     what a resuming session received
 *   record.c     the format of the stream
 *   quirks.c     deviations that a test can switch on
 *
 * Locks, outermost first:
 *
 *   state_mutex      the migration state machine. Held over a whole SET with
 *                    the time that its arcs take, and over queries; sleeps.
 *   data file lock   position in the stream; held over a whole read or write.
 *   lock             the device: registers, state, interrupts, DMA log, what a
 *                    session plans. Never held while user memory is copied;
 *                    DMA is done under it, so what takes it and changes the
 *                    migration state knows that no DMA is under way.
 *
 * reset_lock decides who does the migration part of a reset: the one who
 * resets, or the one who has state_mutex just then (ferrydev_state_unlock()).
 */
#ifndef FERRYDEV_H
#define FERRYDEV_H

#include <linux/kref.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "quirks.h"

/* The PCI function; docs/workload.md is the contract with the guest. */
#define FERRYDEV_VENDOR_ID		0x1b36
#define FERRYDEV_DEVICE_ID		0x00f7
#define FERRYDEV_SUBSYSTEM_VENDOR_ID	0x1b36
#define FERRYDEV_SUBSYSTEM_ID		0x0001
#define FERRYDEV_CLASS_REVISION		0x08800001

#define FERRYDEV_BAR_BYTES		4096
#define FERRYDEV_CONFIG_SPACE_BYTES	256
#define FERRYDEV_MSIX_VECTORS		4
#define FERRYDEV_MSIX_MASK		(BIT(FERRYDEV_MSIX_VECTORS) - 1)
#define FERRYDEV_MSIX_TABLE_BYTES	(FERRYDEV_MSIX_VECTORS * 16)
#define FERRYDEV_MSIX_PBA_OFFSET	0x800

/* Bits of CONTROL and STATUS that are state. */
#define FERRYDEV_CONTROL_DMA		BIT(0)
#define FERRYDEV_CONTROL_IRQ		BIT(1)
#define FERRYDEV_CONTROL_MASK		(FERRYDEV_CONTROL_DMA | FERRYDEV_CONTROL_IRQ)
#define FERRYDEV_STATUS_RECONFIGURED	BIT(0)
#define FERRYDEV_STATUS_DMA_FAILED	BIT(1)
#define FERRYDEV_STATUS_INTX		BIT(2)
#define FERRYDEV_STATUS_MASK		(FERRYDEV_STATUS_RECONFIGURED | FERRYDEV_STATUS_DMA_FAILED)

#define FERRYDEV_DMA_RATE_MAX		1000000
/* Doorbell stamps that are done before the write returns. */
#define FERRYDEV_DOORBELL_SYNC_STAMPS	1024

/* Bulk state comes in blocks; 16 of them, a group, make one record. */
#define FERRYDEV_BLOCK_BYTES		4096
#define FERRYDEV_GROUP_BLOCKS		16

/* Records of the stream, see record.c. */
#define FERRYDEV_HEADER_BYTES		32
#define FERRYDEV_PAYLOAD_BYTES_MAX	(FERRYDEV_GROUP_BLOCKS * FERRYDEV_BLOCK_BYTES)
#define FERRYDEV_RECORD_BYTES_MAX	(FERRYDEV_HEADER_BYTES + FERRYDEV_PAYLOAD_BYTES_MAX)
#define FERRYDEV_GEOMETRY_BYTES		16
#define FERRYDEV_REGS_BYTES		88
#define FERRYDEV_STREAM_VERSION		1

#define FERRYDEV_DIGEST_BYTES		32

/* Sizes of one device; source and destination must agree on the first three. */
struct ferrydev_geometry {
	u64 bulk_bytes;
	u32 config_kib;		/* configuration after power-on */
	u32 config_kib_max;
	u64 stop_only_bytes;	/* end of the bulk that only STOP_COPY reads */
};

/*
 * The configuration: bytes that follow from generation and size, or bytes that
 * a stream brought. A saving session holds the one it is sending.
 */
struct ferrydev_config {
	struct kref kref;
	u32 generation;
	u64 bytes;
	void *stored;		/* NULL: generated when it is read */
};

/*
 * A block of bulk state: what fill number @fill wrote, made when it is read, or
 * bytes that a stream brought. Only the latter take memory.
 */
struct ferrydev_block {
	u64 fill;
	void *stored;
};

/* Registers and counters. All of it is state. */
struct ferrydev_regs {
	u32 control;
	u32 status;		/* without FERRYDEV_STATUS_INTX */
	u32 config_kib;
	u32 dma_pages;
	u32 dma_rate;
	u32 vector;
	u32 fill_kib;
	u32 scratch;
	u64 dma_addr;
	u64 completed;		/* stamps written */
	u64 raised;		/* interrupts raised */
	u64 owed;		/* doorbell stamps still to be written */
	u64 fills;		/* fills of bulk state so far */
	u64 fill_cursor;	/* block that the next fill starts at */
	u8 irq_owed;		/* the doorbell's interrupt is to be raised */
	u8 msix_pending;
	u8 intx_pending;
};

/* What migrates: everything that follows from what the guest did. */
struct ferrydev_state {
	struct ferrydev_regs regs;
	struct ferrydev_config *config;
	struct ferrydev_block *blocks;
};

/* What sysfs and module parameters set; a table in main.c has the names. */
enum ferrydev_setting {
	FERRYDEV_STATE_BYTES,
	FERRYDEV_CONFIG_BYTES,
	FERRYDEV_CONFIG_BYTES_MAX,
	FERRYDEV_STOP_ONLY_BYTES,
	FERRYDEV_DIRTY_BYTES_PER_S,
	/* Times: of arcs by where they lead, of the final save, of queries. */
	FERRYDEV_TO_PRECOPY_MS,
	FERRYDEV_TO_P2P_MS,
	FERRYDEV_TO_STOP_MS,
	FERRYDEV_TO_RUNNING_MS,
	FERRYDEV_SAVE_MS,
	FERRYDEV_LOAD_MS,
	FERRYDEV_RESET_MS,
	FERRYDEV_INFO_MS,
	FERRYDEV_DATA_SIZE_MS,
	FERRYDEV_REPORT_MS,
	FERRYDEV_SETTINGS
};

struct ferrydev_dma_range {
	unsigned long first;
	unsigned long last;
};

struct ferrydev_dma_log {
	bool active;
	bool incomplete;	/* a page could not be noted */
	u32 nr_ranges;
	struct ferrydev_dma_range *ranges;	/* ascending */
	struct xarray pages;	/* 4 KiB page number: LOG_WRITTEN */
};

/* Something done at a rate while the device works; not state. */
struct ferrydev_pace {
	bool running;
	u64 since_ns;
	u64 done;
};

struct ferrydev_saver;
struct ferrydev_loader;

/* A data_fd. The user holds it as long as they like; a session may be shorter. */
struct ferrydev_file {
	struct file *filp;
	struct ferrydev *fdev;
	/* The position: over a whole read or write. */
	struct mutex lock;
	wait_queue_head_t wait;
	bool dead;		/* the session ended; set under fdev->lock */
	u64 moved;		/* bytes so far */
	struct ferrydev_saver *saver;
	struct ferrydev_loader *loader;
};

struct ferrydev {
	struct vfio_device vdev;

	/* The migration state machine. */
	struct mutex state_mutex;
	/* Who does the migration part of a reset. */
	spinlock_t reset_lock;
	bool deferred_reset;
	enum vfio_device_mig_state mig_state;	/* written under lock too */
	enum vfio_device_mig_state mig_state_before;
	struct ferrydev_file *migf;	/* the live session */
	u64 sets;
	enum vfio_device_mig_state target;	/* of the SET under way */
	u64 loaded_in_set;
	bool size_object;		/* for break-Z4 */

	/* The device; all of it under lock. */
	struct mutex lock;
	bool open;
	struct ferrydev_geometry geometry;
	u64 settings[FERRYDEV_SETTINGS];
	struct ferrydev_quirks quirks;
	struct ferrydev_state state;
	struct ferrydev_dma_log dma_log;
	bool wedged;			/* for stay-in-resuming */

	u8 config_space[FERRYDEV_CONFIG_SPACE_BYTES];
	u8 config_writable[FERRYDEV_CONFIG_SPACE_BYTES];
	u8 msix_table[FERRYDEV_MSIX_TABLE_BYTES];
	struct eventfd_ctx *msix_eventfd[FERRYDEV_MSIX_VECTORS];
	struct eventfd_ctx *intx_eventfd;
	u8 msix_masked;
	bool intx_masked;

	struct delayed_work work;
	struct ferrydev_pace stamps;
	struct ferrydev_pace dirtying;
};

static inline struct ferrydev *to_ferrydev(struct vfio_device *vdev)
{
	return container_of(vdev, struct ferrydev, vdev);
}

/* Is a quirk on? Quirks may change at any time, so each place asks once. */
static inline bool ferrydev_has(const struct ferrydev *fdev,
				enum ferrydev_quirk quirk)
{
	return test_bit(quirk, fdev->quirks.on);
}

/* The device does its work in these states. */
static inline bool ferrydev_is_active(const struct ferrydev *fdev)
{
	switch (fdev->mig_state) {
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_PRE_COPY:
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		return true;
	default:
		return false;
	}
}

static inline bool ferrydev_is_precopy(const struct ferrydev *fdev)
{
	return fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY ||
	       fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static inline bool ferrydev_is_p2p(const struct ferrydev *fdev)
{
	return fdev->mig_state == VFIO_DEVICE_STATE_RUNNING_P2P ||
	       fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static inline u64 ferrydev_blocks(const struct ferrydev_geometry *geometry)
{
	return DIV_ROUND_UP_ULL(geometry->bulk_bytes, FERRYDEV_BLOCK_BYTES);
}

/* Blocks from this one on are read in STOP_COPY only. */
static inline u64 ferrydev_first_stop_only(const struct ferrydev_geometry *geometry)
{
	u64 bytes = geometry->bulk_bytes;

	if (!geometry->stop_only_bytes)
		return ferrydev_blocks(geometry);
	bytes -= min(bytes, geometry->stop_only_bytes);
	return bytes / FERRYDEV_BLOCK_BYTES;
}

/* The last block may be short. */
static inline u32 ferrydev_block_bytes(const struct ferrydev_geometry *geometry,
				       u64 block)
{
	u64 start = block * FERRYDEV_BLOCK_BYTES;

	return min_t(u64, geometry->bulk_bytes - start, FERRYDEV_BLOCK_BYTES);
}

/* main.c */
extern struct workqueue_struct *ferrydev_wq;
void ferrydev_power_on(struct ferrydev *fdev);
void ferrydev_pass(const struct ferrydev *fdev, enum ferrydev_setting time);
void ferrydev_pass_ms(u64 ms);

/* function.c */
void ferrydev_function_reset(struct ferrydev *fdev);
bool ferrydev_bus_master(const struct ferrydev *fdev);
bool ferrydev_intx_disabled(const struct ferrydev *fdev);
bool ferrydev_msix_enabled(const struct ferrydev *fdev);
void ferrydev_fill_bulk(struct ferrydev *fdev, u64 blocks);
ssize_t ferrydev_region_read(struct vfio_device *vdev, char __user *buf,
			     size_t count, loff_t *ppos);
ssize_t ferrydev_region_write(struct vfio_device *vdev, const char __user *buf,
			      size_t count, loff_t *ppos);
int ferrydev_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
			 struct vfio_info_cap *caps);

/* irq.c */
void ferrydev_raise(struct ferrydev *fdev);
void ferrydev_deliver(struct ferrydev *fdev);
void ferrydev_irqs_reset(struct ferrydev *fdev);
int ferrydev_irq_info(struct vfio_irq_info *info);
long ferrydev_set_irqs(struct ferrydev *fdev, void __user *arg);

/* work.c */
void ferrydev_work(struct work_struct *work);
void ferrydev_kick(struct ferrydev *fdev);
void ferrydev_restart_pace(struct ferrydev *fdev);
void ferrydev_work_off(struct ferrydev *fdev, u64 budget);

/* dma_log.c */
extern const struct vfio_log_ops ferrydev_log_ops;
void ferrydev_dma_log_init(struct ferrydev *fdev);
void ferrydev_dma_log_end(struct ferrydev *fdev);
void ferrydev_dma_log_note(struct ferrydev *fdev, unsigned long iova, size_t len);

/* state.c */
struct ferrydev_config *ferrydev_config_new(u32 generation, u64 bytes, void *stored);
struct ferrydev_config *ferrydev_config_get(struct ferrydev_config *config);
void ferrydev_config_put(struct ferrydev_config *config);
void ferrydev_config_read(const struct ferrydev_config *config, u64 offset,
			  void *out, size_t len);
int ferrydev_state_alloc(struct ferrydev *fdev);
void ferrydev_state_free(struct ferrydev *fdev);
void ferrydev_state_power_on(struct ferrydev *fdev);
void ferrydev_state_reconfigure(struct ferrydev *fdev, struct ferrydev_config *config);
void ferrydev_block_fill(struct ferrydev *fdev, u64 block, u64 fill);
int ferrydev_block_store(struct ferrydev *fdev, u64 block, const void *bytes);
u32 ferrydev_block_read(const struct ferrydev *fdev, u64 block, void *out);
void ferrydev_state_digest(const struct ferrydev *fdev, u8 *digest, void *scratch);

/* migration.c */
extern const struct vfio_migration_ops ferrydev_migration_ops;
const char *ferrydev_state_name(unsigned int state);
int ferrydev_next_state(struct ferrydev *fdev, enum vfio_device_mig_state target,
			enum vfio_device_mig_state *next);
void ferrydev_state_unlock(struct ferrydev *fdev);
int ferrydev_reset(struct ferrydev *fdev);
void ferrydev_end_session(struct ferrydev *fdev);

/* data_file.c */
struct file *ferrydev_file_dead(struct ferrydev *fdev);
struct ferrydev_file *ferrydev_file_new(struct ferrydev *fdev, bool saving, bool precopy);
void ferrydev_file_kill(struct ferrydev_file *migf);

/* saver.c */
struct ferrydev_precopy {
	u64 initial_bytes;
	u64 dirty_bytes;
	bool reinit;
};

struct ferrydev_saver *ferrydev_saver_new(struct ferrydev *fdev);
void ferrydev_saver_rebegin(struct ferrydev_saver *saver, struct ferrydev *fdev);
void ferrydev_saver_begin(struct ferrydev_saver *saver, struct ferrydev *fdev, bool precopy);
void ferrydev_saver_free(struct ferrydev_saver *saver);
void ferrydev_saver_note_fill(struct ferrydev_saver *saver, u64 block);
void ferrydev_saver_note_config(struct ferrydev_saver *saver);
void ferrydev_saver_restart(struct ferrydev_saver *saver, struct ferrydev *fdev);
void ferrydev_saver_stop_copy(struct ferrydev_saver *saver, struct ferrydev *fdev);
void ferrydev_saver_info(struct ferrydev_saver *saver, struct ferrydev *fdev,
			 struct ferrydev_precopy *info);
u64 ferrydev_saver_remaining(struct ferrydev_saver *saver, struct ferrydev *fdev);
u64 ferrydev_whole_stream_bytes(struct ferrydev *fdev);
bool ferrydev_saver_readable(struct ferrydev_saver *saver, struct ferrydev *fdev);
/* At the end of what there is: -ENOMSG now, 0 for good. Else how much @from has. */
ssize_t ferrydev_saver_peek(struct ferrydev_saver *saver, struct ferrydev *fdev,
			    const u8 **from);
void ferrydev_saver_advance(struct ferrydev_saver *saver, size_t len);
bool ferrydev_saver_initial_left(struct ferrydev_saver *saver);

/* loader.c */
struct ferrydev_loader *ferrydev_loader_new(void);
void ferrydev_loader_restart(struct ferrydev_loader *loader);
void ferrydev_loader_free(struct ferrydev_loader *loader);
int ferrydev_loader_begin(struct ferrydev_loader *loader, struct ferrydev *fdev);
/* Where the next bytes of the stream go, and how many at most. */
size_t ferrydev_loader_room(struct ferrydev_loader *loader, u8 **to);
int ferrydev_loader_take(struct ferrydev_loader *loader, struct ferrydev *fdev, size_t len);
int ferrydev_loader_finish(struct ferrydev_loader *loader, struct ferrydev *fdev);

/* record.c */
enum ferrydev_record_kind {
	FERRYDEV_RECORD_HEADER = 1,
	FERRYDEV_RECORD_CONFIG,
	FERRYDEV_RECORD_CONFIG_DATA,
	FERRYDEV_RECORD_BULK,
	FERRYDEV_RECORD_REGS,
	FERRYDEV_RECORD_END
};

struct ferrydev_record {
	u16 kind;
	u16 arg;
	u64 sequence;
	u64 value;
	u32 payload_bytes;
	u32 checksum;
};

void ferrydev_record_seal(u8 *record, u16 kind, u16 arg, u64 sequence, u64 value,
			  u32 payload_bytes);
int ferrydev_record_parse(const u8 *header, struct ferrydev_record *record);
bool ferrydev_record_intact(const u8 *record, const struct ferrydev_record *parsed);
void ferrydev_geometry_encode(u8 *out, const struct ferrydev_geometry *geometry);
void ferrydev_regs_encode(u8 *out, const struct ferrydev_regs *regs);
int ferrydev_regs_decode(const u8 *in, const struct ferrydev_geometry *geometry,
			 struct ferrydev_regs *regs);

/* quirks.c */
int ferrydev_quirks_parse(struct ferrydev_quirks *quirks, const char *text);
ssize_t ferrydev_quirks_print(const struct ferrydev_quirks *quirks, char *page);
ssize_t ferrydev_quirks_names(char *page);
u32 ferrydev_quirk_arc_ms(const struct ferrydev *fdev, unsigned int to);
int ferrydev_quirk_arc_fails(struct ferrydev *fdev, unsigned int from,
			     unsigned int to, bool *to_error);
bool ferrydev_quirk_answers_set(struct ferrydev *fdev,
				enum vfio_device_mig_state target, int *rc);
enum vfio_device_mig_state ferrydev_quirk_shown_state(struct ferrydev *fdev);
int ferrydev_quirk_next_state(struct ferrydev *fdev, enum vfio_device_mig_state target,
			      enum vfio_device_mig_state *next);
void ferrydev_quirk_after_end(struct ferrydev *fdev);

#endif /* FERRYDEV_H */
