// SPDX-License-Identifier: GPL-2.0-only
/*
 * The PCI function: configuration space, BAR 0 with the registers, BAR 2 with
 * the MSI-X table. docs/workload.md is the contract; the constants are those of
 * crates/device-model/src/regs.rs.
 */

#include <linux/pci_regs.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

#define REGION_SHIFT		40
#define REGION_OFFSET(index)	((u64)(index) << REGION_SHIFT)

/* Registers of BAR 0. */
#define REG_ID			0x00
#define REG_VERSION		0x04
#define REG_CONTROL		0x08
#define REG_STATUS		0x0c
#define REG_CONFIG_KIB		0x10
#define REG_CONFIG_GEN		0x14
#define REG_CONFIG_ACK		0x18
#define REG_DMA_LO		0x1c
#define REG_DMA_HI		0x20
#define REG_DMA_PAGES		0x24
#define REG_DMA_RATE		0x28
#define REG_DOORBELL		0x2c
#define REG_COMPLETED		0x30
#define REG_COMPLETED_HI	0x34
#define REG_VECTOR		0x38
#define REG_RAISED		0x3c
#define REG_FILL_KIB		0x40
#define REG_SCRATCH		0x44

#define ID_VALUE		0x59464d56
#define VERSION_VALUE		1

/* Capabilities in configuration space. */
#define CAP_MSIX		0x40
#define CAP_EXP			0x50
#define MSIX_BAR		2
#define FLR_BYTE		(CAP_EXP + PCI_EXP_DEVCTL + 1)
#define FLR_BIT			(PCI_EXP_DEVCTL_BCR_FLR >> 8)

static void set8(struct ferrydev *fdev, unsigned int at, u8 value, u8 writable)
{
	fdev->config_space[at] = value;
	fdev->config_writable[at] = writable;
}

static void set16(struct ferrydev *fdev, unsigned int at, u16 value, u16 writable)
{
	put_unaligned_le16(value, fdev->config_space + at);
	put_unaligned_le16(writable, fdev->config_writable + at);
}

static void set32(struct ferrydev *fdev, unsigned int at, u32 value, u32 writable)
{
	put_unaligned_le32(value, fdev->config_space + at);
	put_unaligned_le32(writable, fdev->config_writable + at);
}

static u16 config_word(const struct ferrydev *fdev, unsigned int at)
{
	return get_unaligned_le16(fdev->config_space + at);
}

bool ferrydev_bus_master(const struct ferrydev *fdev)
{
	return config_word(fdev, PCI_COMMAND) & PCI_COMMAND_MASTER;
}

bool ferrydev_intx_disabled(const struct ferrydev *fdev)
{
	return config_word(fdev, PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE;
}

bool ferrydev_msix_enabled(const struct ferrydev *fdev)
{
	return config_word(fdev, CAP_MSIX + PCI_MSIX_FLAGS) & PCI_MSIX_FLAGS_ENABLE;
}

/* Configuration space and MSI-X table as after power-on. */
void ferrydev_function_reset(struct ferrydev *fdev)
{
	unsigned int vector;

	memset(fdev->config_space, 0, sizeof(fdev->config_space));
	memset(fdev->config_writable, 0, sizeof(fdev->config_writable));
	set16(fdev, PCI_VENDOR_ID, FERRYDEV_VENDOR_ID, 0);
	set16(fdev, PCI_DEVICE_ID, FERRYDEV_DEVICE_ID, 0);
	set16(fdev, PCI_COMMAND, 0,
	      PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_PARITY |
	      PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	set16(fdev, PCI_STATUS, PCI_STATUS_CAP_LIST, 0);
	set32(fdev, PCI_CLASS_REVISION, FERRYDEV_CLASS_REVISION, 0);
	set8(fdev, PCI_CACHE_LINE_SIZE, 0, 0xff);
	set8(fdev, PCI_LATENCY_TIMER, 0, 0xff);
	set32(fdev, PCI_BASE_ADDRESS_0, 0, ~(FERRYDEV_BAR_BYTES - 1));
	set32(fdev, PCI_BASE_ADDRESS_2, 0, ~(FERRYDEV_BAR_BYTES - 1));
	set16(fdev, PCI_SUBSYSTEM_VENDOR_ID, FERRYDEV_SUBSYSTEM_VENDOR_ID, 0);
	set16(fdev, PCI_SUBSYSTEM_ID, FERRYDEV_SUBSYSTEM_ID, 0);
	set8(fdev, PCI_CAPABILITY_LIST, CAP_MSIX, 0);
	set8(fdev, PCI_INTERRUPT_LINE, 0, 0xff);
	set8(fdev, PCI_INTERRUPT_PIN, 1, 0);

	set8(fdev, CAP_MSIX, PCI_CAP_ID_MSIX, 0);
	set8(fdev, CAP_MSIX + 1, CAP_EXP, 0);
	set16(fdev, CAP_MSIX + PCI_MSIX_FLAGS, FERRYDEV_MSIX_VECTORS - 1,
	      PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL);
	set32(fdev, CAP_MSIX + PCI_MSIX_TABLE, MSIX_BAR, 0);
	set32(fdev, CAP_MSIX + PCI_MSIX_PBA, FERRYDEV_MSIX_PBA_OFFSET | MSIX_BAR, 0);

	set8(fdev, CAP_EXP, PCI_CAP_ID_EXP, 0);
	set16(fdev, CAP_EXP + PCI_EXP_FLAGS, 2, 0);
	set32(fdev, CAP_EXP + PCI_EXP_DEVCAP, PCI_EXP_DEVCAP_FLR, 0);
	/* Initiate FLR is acted on and always reads 0. */
	set16(fdev, CAP_EXP + PCI_EXP_DEVCTL, 0, (u16)~PCI_EXP_DEVCTL_BCR_FLR);
	set32(fdev, CAP_EXP + PCI_EXP_LNKCAP, 0x00000411, 0);
	set16(fdev, CAP_EXP + PCI_EXP_LNKSTA, 0x0011, 0);

	memset(fdev->msix_table, 0, sizeof(fdev->msix_table));
	for (vector = 0; vector < FERRYDEV_MSIX_VECTORS; vector++)
		fdev->msix_table[vector * 16 + 12] = 1;
}

/* Answers whether Initiate FLR was written. */
static bool config_write(struct ferrydev *fdev, unsigned int at, const u8 *data, size_t len)
{
	bool flr = false;
	u8 mask;

	for (; len; len--, at++, data++) {
		mask = fdev->config_writable[at];
		fdev->config_space[at] = (fdev->config_space[at] & ~mask) | (*data & mask);
		flr |= at == FLR_BYTE && *data & FLR_BIT;
	}
	return flr;
}

static u32 register_read(const struct ferrydev *fdev, unsigned int offset)
{
	const struct ferrydev_regs *regs = &fdev->state.regs;

	switch (offset) {
	case REG_ID:
		return ID_VALUE;
	case REG_VERSION:
		return VERSION_VALUE;
	case REG_CONTROL:
		return regs->control;
	case REG_STATUS:
		return regs->status | (regs->intx_pending ? FERRYDEV_STATUS_INTX : 0);
	case REG_CONFIG_KIB:
		return regs->config_kib;
	case REG_CONFIG_GEN:
	case REG_CONFIG_ACK:
		return fdev->state.config->generation;
	case REG_DMA_LO:
		return lower_32_bits(regs->dma_addr);
	case REG_DMA_HI:
		return upper_32_bits(regs->dma_addr);
	case REG_DMA_PAGES:
		return regs->dma_pages;
	case REG_DMA_RATE:
		return regs->dma_rate;
	case REG_COMPLETED:
		return lower_32_bits(regs->completed);
	case REG_COMPLETED_HI:
		return upper_32_bits(regs->completed);
	case REG_VECTOR:
		return regs->vector;
	case REG_RAISED:
		return lower_32_bits(regs->raised);
	case REG_FILL_KIB:
		return regs->fill_kib;
	case REG_SCRATCH:
		return regs->scratch;
	default:
		return 0;
	}
}

/* Rewrites @blocks blocks of bulk state, from where the last fill ended. */
void ferrydev_fill_bulk(struct ferrydev *fdev, u64 blocks)
{
	struct ferrydev_regs *regs = &fdev->state.regs;
	u64 all = ferrydev_blocks(&fdev->geometry);

	blocks = min(blocks, all);
	if (!blocks)
		return;
	regs->fills++;
	for (; blocks; blocks--) {
		ferrydev_block_fill(fdev, regs->fill_cursor, regs->fills);
		if (fdev->migf && fdev->migf->saver)
			ferrydev_saver_note_fill(fdev->migf->saver, regs->fill_cursor);
		if (++regs->fill_cursor == all)
			regs->fill_cursor = 0;
	}
	if (fdev->migf)
		wake_up_interruptible(&fdev->migf->wait);
}

/* The guest asks for new initial data: REINIT. */
static void reconfigure(struct ferrydev *fdev, u32 generation)
{
	struct ferrydev_regs *regs = &fdev->state.regs;
	struct ferrydev_config *config;

	config = ferrydev_config_new(generation, regs->config_kib * 1024ULL, NULL);
	regs->status |= FERRYDEV_STATUS_RECONFIGURED;
	ferrydev_state_reconfigure(fdev, config);
	if (fdev->migf && fdev->migf->saver) {
		ferrydev_saver_note_config(fdev->migf->saver);
		wake_up_interruptible(&fdev->migf->wait);
	}
}

static void register_write(struct ferrydev *fdev, unsigned int offset, u32 value)
{
	struct ferrydev_regs *regs = &fdev->state.regs;

	/* A stopped device does not change, whoever touches it. */
	if (!ferrydev_is_active(fdev))
		return;

	switch (offset) {
	case REG_CONTROL:
		regs->control = value & FERRYDEV_CONTROL_MASK;
		ferrydev_restart_pace(fdev);
		break;
	case REG_STATUS:
		regs->status &= ~(value & FERRYDEV_STATUS_DMA_FAILED);
		if (value & FERRYDEV_STATUS_INTX)
			regs->intx_pending = 0;
		break;
	case REG_CONFIG_KIB:
		regs->config_kib = min(value, fdev->geometry.config_kib_max);
		break;
	case REG_CONFIG_GEN:
		reconfigure(fdev, value);
		break;
	case REG_DMA_LO:
		regs->dma_addr = (regs->dma_addr & ~(u64)U32_MAX) | (value & ~0xfffU);
		break;
	case REG_DMA_HI:
		regs->dma_addr = (u64)value << 32 | lower_32_bits(regs->dma_addr);
		break;
	case REG_DMA_PAGES:
		regs->dma_pages = value;
		break;
	case REG_DMA_RATE:
		regs->dma_rate = min(value, FERRYDEV_DMA_RATE_MAX);
		ferrydev_restart_pace(fdev);
		break;
	case REG_DOORBELL:
		regs->owed += min_t(u64, value, U64_MAX - regs->owed);
		regs->irq_owed = 1;
		ferrydev_work_off(fdev, FERRYDEV_DOORBELL_SYNC_STAMPS);
		break;
	case REG_VECTOR:
		if (value < FERRYDEV_MSIX_VECTORS)
			regs->vector = value;
		break;
	case REG_FILL_KIB:
		regs->fill_kib = value;
		ferrydev_fill_bulk(fdev, DIV_ROUND_UP_ULL((u64)value * 1024,
							  FERRYDEV_BLOCK_BYTES));
		break;
	case REG_SCRATCH:
		regs->scratch = value;
		break;
	}
	ferrydev_kick(fdev);
}

static void msix_read(const struct ferrydev *fdev, unsigned int offset, u8 *data, size_t len)
{
	memset(data, 0, len);
	if (offset + len <= FERRYDEV_MSIX_TABLE_BYTES)
		memcpy(data, fdev->msix_table + offset, len);
	else if (offset == FERRYDEV_MSIX_PBA_OFFSET)
		data[0] = fdev->state.regs.msix_pending;
}

static bool is_register_access(unsigned int offset, size_t len)
{
	return len == 4 && IS_ALIGNED(offset, 4);
}

static bool is_msix_access(unsigned int offset, size_t len)
{
	return (len == 4 || len == 8) && IS_ALIGNED(offset, len);
}

static u64 region_bytes(unsigned int index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
	case VFIO_PCI_BAR2_REGION_INDEX:
		return FERRYDEV_BAR_BYTES;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return FERRYDEV_CONFIG_SPACE_BYTES;
	default:
		return 0;
	}
}

/* Where an access goes; an error for one that leaves its region. */
static int locate(loff_t pos, size_t count, unsigned int *index, unsigned int *offset)
{
	u64 at, size;

	if (pos < 0 || pos >> REGION_SHIFT >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	*index = pos >> REGION_SHIFT;
	at = pos & (REGION_OFFSET(1) - 1);
	size = region_bytes(*index);
	if (at >= size || count > size - at)
		return -EINVAL;
	*offset = at;
	return 0;
}

ssize_t ferrydev_region_read(struct vfio_device *vdev, char __user *buf,
			     size_t count, loff_t *ppos)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	unsigned int index, offset;
	u8 few[8], *data = few;
	ssize_t rc;

	rc = locate(*ppos, count, &index, &offset);
	if (rc || !count)
		return rc;
	if (count > sizeof(few))
		data = kmalloc(count, GFP_KERNEL);
	if (!data)
		return -ENOMEM;

	mutex_lock(&fdev->lock);
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		memcpy(data, fdev->config_space + offset, count);
	else if (index == VFIO_PCI_BAR0_REGION_INDEX && is_register_access(offset, count))
		put_unaligned_le32(register_read(fdev, offset), data);
	else if (index == VFIO_PCI_BAR2_REGION_INDEX && is_msix_access(offset, count))
		msix_read(fdev, offset, data, count);
	else
		memset(data, 0xff, count);
	mutex_unlock(&fdev->lock);

	rc = count;
	if (copy_to_user(buf, data, count))
		rc = -EFAULT;
	else
		*ppos += count;
	if (data != few)
		kfree(data);
	return rc;
}

ssize_t ferrydev_region_write(struct vfio_device *vdev, const char __user *buf,
			      size_t count, loff_t *ppos)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	unsigned int index, offset;
	bool flr = false;
	ssize_t rc;
	u8 *data;

	rc = locate(*ppos, count, &index, &offset);
	if (rc || !count)
		return rc;
	data = memdup_user(buf, count);
	if (IS_ERR(data))
		return PTR_ERR(data);

	mutex_lock(&fdev->lock);
	if (index == VFIO_PCI_CONFIG_REGION_INDEX) {
		flr = config_write(fdev, offset, data, count);
		ferrydev_deliver(fdev);
	} else if (index == VFIO_PCI_BAR0_REGION_INDEX && is_register_access(offset, count)) {
		register_write(fdev, offset, get_unaligned_le32(data));
	} else if (index == VFIO_PCI_BAR2_REGION_INDEX && is_msix_access(offset, count) &&
		   offset + count <= FERRYDEV_MSIX_TABLE_BYTES) {
		memcpy(fdev->msix_table + offset, data, count);
	}
	mutex_unlock(&fdev->lock);
	kfree(data);

	if (flr) {
		rc = ferrydev_reset(fdev);
		if (rc)
			return rc;
	}
	*ppos += count;
	return count;
}

int ferrydev_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
			 struct vfio_info_cap *caps)
{
	if (info->index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info->offset = REGION_OFFSET(info->index);
	info->size = region_bytes(info->index);
	info->flags = 0;
	if (info->size)
		info->flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	return 0;
}
