// SPDX-License-Identifier: GPL-2.0-only
/*
 * Interrupts between the device and the eventfds of the VMM.
 *
 * What is pending is state and travels; eventfds and masks are the VMM's and do
 * not. A vector fires when it is pending, wired and unmasked while the device
 * works. INTx is a level: it fires once and masks itself, and fires again when
 * it is unmasked while still asserted. All under lock.
 */

#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/slab.h>

#include "ferrydev.h"

static bool msix_wired(const struct ferrydev *fdev)
{
	unsigned int i;

	for (i = 0; i < FERRYDEV_MSIX_VECTORS; i++)
		if (fdev->msix_eventfd[i])
			return true;
	return false;
}

/* Raises VECTOR, or INTx while MSI-X is not in use. */
void ferrydev_raise(struct ferrydev *fdev)
{
	struct ferrydev_regs *regs = &fdev->state.regs;

	if (!(regs->control & FERRYDEV_CONTROL_IRQ))
		return;
	regs->raised++;
	if (ferrydev_msix_enabled(fdev) || msix_wired(fdev))
		regs->msix_pending |= BIT(regs->vector);
	else
		regs->intx_pending = 1;
	ferrydev_deliver(fdev);
}

/* Signals what is pending and can be signalled; nothing while stopped. */
void ferrydev_deliver(struct ferrydev *fdev)
{
	struct ferrydev_regs *regs = &fdev->state.regs;
	unsigned int i;

	if (!ferrydev_is_active(fdev) && !ferrydev_has(fdev, FERRYDEV_BREAK_H3))
		return;
	for (i = 0; i < FERRYDEV_MSIX_VECTORS; i++) {
		if (!fdev->msix_eventfd[i] || !(regs->msix_pending & ~fdev->msix_masked & BIT(i)))
			continue;
		regs->msix_pending &= ~BIT(i);
		eventfd_signal(fdev->msix_eventfd[i]);
	}
	if (regs->intx_pending && fdev->intx_eventfd && !fdev->intx_masked &&
	    !ferrydev_intx_disabled(fdev)) {
		fdev->intx_masked = true;
		eventfd_signal(fdev->intx_eventfd);
	}
}

static void unwire(struct eventfd_ctx **slot)
{
	if (*slot)
		eventfd_ctx_put(*slot);
	*slot = NULL;
}

static void unwire_intx(struct ferrydev *fdev)
{
	unwire(&fdev->intx_eventfd);
	fdev->intx_masked = false;
}

static void unwire_msix(struct ferrydev *fdev)
{
	unsigned int i;

	for (i = 0; i < FERRYDEV_MSIX_VECTORS; i++)
		unwire(&fdev->msix_eventfd[i]);
	fdev->msix_masked = 0;
}

/* Everything unwired and unmasked: the VMM sets it again. */
void ferrydev_irqs_reset(struct ferrydev *fdev)
{
	unwire_intx(fdev);
	unwire_msix(fdev);
}

static unsigned int nr_vectors(unsigned int index)
{
	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX:
		return 1;
	case VFIO_PCI_MSIX_IRQ_INDEX:
		return FERRYDEV_MSIX_VECTORS;
	default:
		return 0;
	}
}

int ferrydev_irq_info(struct vfio_irq_info *info)
{
	if (info->index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info->count = nr_vectors(info->index);
	info->flags = 0;
	if (info->count)
		info->flags = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE;
	if (info->index == VFIO_PCI_INTX_IRQ_INDEX)
		info->flags |= VFIO_IRQ_INFO_AUTOMASKED;
	return 0;
}

static int wire(struct eventfd_ctx **slot, s32 fd)
{
	struct eventfd_ctx *eventfd = NULL;

	if (fd >= 0) {
		eventfd = eventfd_ctx_fdget(fd);
		if (IS_ERR(eventfd))
			return PTR_ERR(eventfd);
	}
	unwire(slot);
	*slot = eventfd;
	return 0;
}

static void set_mask(struct ferrydev *fdev, bool intx, unsigned int vector, bool masked)
{
	if (intx)
		fdev->intx_masked = masked;
	else if (masked)
		fdev->msix_masked |= BIT(vector);
	else
		fdev->msix_masked &= ~BIT(vector);
}

/* One vector. @data is its element of the array, or NULL for DATA_NONE. */
static int set_irq(struct ferrydev *fdev, bool intx, unsigned int vector, u32 flags,
		   const void *data)
{
	struct eventfd_ctx **slot = intx ? &fdev->intx_eventfd : &fdev->msix_eventfd[vector];
	bool is_eventfd = flags & VFIO_IRQ_SET_DATA_EVENTFD;
	bool on = !data || is_eventfd || *(const u8 *)data;

	switch (flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) {
	case VFIO_IRQ_SET_ACTION_MASK:
	case VFIO_IRQ_SET_ACTION_UNMASK:
		if (is_eventfd)
			return -ENOTTY;
		if (on)
			set_mask(fdev, intx, vector, flags & VFIO_IRQ_SET_ACTION_MASK);
		return 0;
	case VFIO_IRQ_SET_ACTION_TRIGGER:
		if (is_eventfd)
			return wire(slot, *(const s32 *)data);
		/* A loop-back test of the wiring. */
		if (on && *slot)
			eventfd_signal(*slot);
		return 0;
	default:
		return -EINVAL;
	}
}

static int set_irqs(struct ferrydev *fdev, const struct vfio_irq_set *set, const void *data)
{
	bool intx = set->index == VFIO_PCI_INTX_IRQ_INDEX;
	size_t step = set->flags & VFIO_IRQ_SET_DATA_EVENTFD ? sizeof(s32) : sizeof(u8);
	u32 i;
	int rc;

	if (!set->count) {
		if (set->flags != (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER))
			return -EINVAL;
		if (intx)
			unwire_intx(fdev);
		else
			unwire_msix(fdev);
		return 0;
	}
	for (i = 0; i < set->count; i++) {
		rc = set_irq(fdev, intx, set->start + i, set->flags,
			     data ? data + i * step : NULL);
		if (rc)
			return rc;
	}
	return 0;
}

long ferrydev_set_irqs(struct ferrydev *fdev, void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_set set;
	size_t data_size = 0;
	void *data = NULL;
	int rc;

	if (copy_from_user(&set, arg, minsz))
		return -EFAULT;
	rc = vfio_set_irqs_validate_and_prepare(&set, nr_vectors(set.index),
						VFIO_PCI_NUM_IRQS, &data_size);
	if (rc)
		return rc;
	if (data_size) {
		data = memdup_user(arg + minsz, data_size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	mutex_lock(&fdev->lock);
	rc = set_irqs(fdev, &set, data);
	ferrydev_deliver(fdev);
	mutex_unlock(&fdev->lock);
	kfree(data);
	return rc;
}
