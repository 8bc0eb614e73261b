// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the device does by itself: stamps into guest memory, and dirtying its
 * own bulk state.
 *
 * Stamps are owed by a doorbell or due by DMA_RATE. Owed ones are state and
 * travel; how far a rate has come is not, and starts anew in each state that
 * works. All under lock, so a migration state is entered between two stamps.
 */

#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/math64.h>
#include <linux/overflow.h>
#include <linux/sizes.h>
#include <linux/unaligned.h>

#include "ferrydev.h"

#define STAMP_BYTES	16
#define STAMP_STRIDE	4096
/* Others may have the lock after so many. */
#define STAMPS_PER_HOLD	256
#define NEVER		U64_MAX

/* What break-H3 dirties in a stopped device, where no rate is set. */
#define BREAK_H3_BYTES_PER_S	SZ_1M

/*
 * May DMA be started? Guest memory and a peer's BAR look alike to vfio_dma_rw(),
 * so in the P2P states the device starts none at all.
 */
static bool may_dma(const struct ferrydev *fdev)
{
	if (ferrydev_is_p2p(fdev))
		return ferrydev_has(fdev, FERRYDEV_BREAK_H2);
	if (ferrydev_is_active(fdev))
		return true;
	return fdev->mig_state != VFIO_DEVICE_STATE_RESUMING &&
	       ferrydev_has(fdev, FERRYDEV_BREAK_H3);
}

static u64 dirty_rate(const struct ferrydev *fdev)
{
	if (ferrydev_is_active(fdev))
		return fdev->settings[FERRYDEV_DIRTY_BYTES_PER_S];
	if (fdev->mig_state != VFIO_DEVICE_STATE_RESUMING &&
	    ferrydev_has(fdev, FERRYDEV_BREAK_H3))
		return max(fdev->settings[FERRYDEV_DIRTY_BYTES_PER_S], BREAK_H3_BYTES_PER_S);
	return 0;
}

static u64 stamp_rate(const struct ferrydev *fdev)
{
	const struct ferrydev_regs *regs = &fdev->state.regs;

	return may_dma(fdev) && regs->control & FERRYDEV_CONTROL_DMA ? regs->dma_rate : 0;
}

/* How many are due at @rate per second. More than a second's are let go. */
static u64 pace_due(struct ferrydev_pace *pace, u64 rate, u64 now_ns)
{
	u64 behind;

	if (!rate) {
		pace->running = false;
		return 0;
	}
	if (pace->running) {
		behind = mul_u64_u64_div_u64(now_ns - pace->since_ns, rate, NSEC_PER_SEC);
		behind -= min(behind, pace->done);
		if (behind <= rate)
			return behind;
	}
	pace->running = true;
	pace->since_ns = now_ns;
	pace->done = 0;
	return 0;
}

/* When there will be @more to do; NEVER without a rate. */
static u64 pace_wait_ns(const struct ferrydev_pace *pace, u64 rate, u64 more, u64 now_ns)
{
	u64 at_ns;

	if (!rate)
		return NEVER;
	if (!pace->running)
		return 0;
	at_ns = pace->since_ns;
	at_ns += mul_u64_u64_div_u64(pace->done + more, NSEC_PER_SEC, rate) + 1;
	return at_ns > now_ns ? at_ns - now_ns : 0;
}

/* A rate, or what it depends on, changed: count from now. */
void ferrydev_restart_pace(struct ferrydev *fdev)
{
	fdev->stamps.running = false;
	fdev->dirtying.running = false;
}

static bool write_stamp(struct ferrydev *fdev)
{
	struct ferrydev_regs *regs = &fdev->state.regs;
	u8 stamp[STAMP_BYTES];
	u64 page, iova;

	if (!regs->dma_pages || !ferrydev_bus_master(fdev) || fdev->wedged)
		return false;
	div64_u64_rem(regs->completed, regs->dma_pages, &page);
	if (check_add_overflow(regs->dma_addr, page * STAMP_STRIDE, &iova))
		return false;
	put_unaligned_le64(regs->completed, stamp);
	put_unaligned_le64(regs->completed * 0x9e3779b97f4a7c15ULL, stamp + 8);
	if (vfio_dma_rw(&fdev->vdev, iova, stamp, sizeof(stamp), true))
		return false;
	/*
	 * After the bytes and in one hold of the lock with them: a report never
	 * misses a page that a copy of it missed.
	 */
	ferrydev_dma_log_note(fdev, iova, sizeof(stamp));
	regs->completed++;
	return true;
}

static void answer_doorbell(struct ferrydev *fdev)
{
	struct ferrydev_regs *regs = &fdev->state.regs;

	if (regs->irq_owed && !regs->owed) {
		regs->irq_owed = 0;
		ferrydev_raise(fdev);
	}
}

/* At most @budget stamps of what is owed and due. */
void ferrydev_work_off(struct ferrydev *fdev, u64 budget)
{
	struct ferrydev_regs *regs = &fdev->state.regs;
	u64 due;

	if (!may_dma(fdev))
		return;
	answer_doorbell(fdev);
	for (; regs->owed && budget; budget--) {
		/* A stamp that fails ends the doorbell. */
		if (write_stamp(fdev)) {
			regs->owed--;
		} else {
			regs->status |= FERRYDEV_STATUS_DMA_FAILED;
			regs->owed = 0;
		}
		answer_doorbell(fdev);
	}
	if (!budget)
		return;
	due = pace_due(&fdev->stamps, stamp_rate(fdev), ktime_get_ns());
	for (; due && budget; due--, budget--) {
		fdev->stamps.done++;
		if (!write_stamp(fdev))
			regs->status |= FERRYDEV_STATUS_DMA_FAILED;
	}
}

static void dirty_bulk(struct ferrydev *fdev)
{
	u64 blocks = pace_due(&fdev->dirtying, dirty_rate(fdev), ktime_get_ns());

	blocks = div_u64(blocks, FERRYDEV_BLOCK_BYTES);
	if (!blocks)
		return;
	fdev->dirtying.done += blocks * FERRYDEV_BLOCK_BYTES;
	ferrydev_fill_bulk(fdev, blocks);
}

static u64 next_due_ns(const struct ferrydev *fdev)
{
	const struct ferrydev_regs *regs = &fdev->state.regs;
	u64 now_ns = ktime_get_ns();

	if (may_dma(fdev) && (regs->owed || regs->irq_owed))
		return 0;
	return min(pace_wait_ns(&fdev->stamps, stamp_rate(fdev), 1, now_ns),
		   pace_wait_ns(&fdev->dirtying, dirty_rate(fdev),
				FERRYDEV_BLOCK_BYTES, now_ns));
}

void ferrydev_work(struct work_struct *work)
{
	struct ferrydev *fdev = container_of(to_delayed_work(work), struct ferrydev, work);
	u64 wait_ns;

	mutex_lock(&fdev->lock);
	if (fdev->open) {
		ferrydev_work_off(fdev, STAMPS_PER_HOLD);
		dirty_bulk(fdev);
		wait_ns = next_due_ns(fdev);
		/* Rates go in batches of a jiffy; a doorbell does not wait. */
		if (wait_ns != NEVER)
			queue_delayed_work(ferrydev_wq, &fdev->work,
					   wait_ns ? nsecs_to_jiffies(wait_ns) + 1 : 0);
	}
	mutex_unlock(&fdev->lock);
}

/* There may be something to do now. Under lock. */
void ferrydev_kick(struct ferrydev *fdev)
{
	if (fdev->open && next_due_ns(fdev) != NEVER)
		mod_delayed_work(ferrydev_wq, &fdev->work, 0);
}
