// SPDX-License-Identifier: GPL-2.0-only
/*
 * DMA logging: which pages the device wrote.
 *
 * Pages are 4 KiB whatever the caller hints at, the smallest that a report can
 * ask for, so a page is never half inside of one. They are kept in an xarray:
 * memory follows what was written, not what a range claims.
 *
 * The core checks ranges and the report's arguments; that there is one START
 * for one STOP is the driver's to check.
 */

#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/log2.h>
#include <linux/slab.h>

#include "ferrydev.h"

#define LOG_PAGE_SHIFT	12
#define LOG_PAGE_BYTES	BIT(LOG_PAGE_SHIFT)

/* What is known of a page that was written. */
#define LOG_WRITTEN	1
#define LOG_LATE	2	/* for break-L10: the report after next tells it */

void ferrydev_dma_log_init(struct ferrydev *fdev)
{
	xa_init(&fdev->dma_log.pages);
}

/* Logging is off, or ends. Under lock. */
void ferrydev_dma_log_end(struct ferrydev *fdev)
{
	struct ferrydev_dma_log *log = &fdev->dma_log;

	log->active = false;
	log->incomplete = false;
	log->nr_ranges = 0;
	kfree(log->ranges);
	log->ranges = NULL;
	xa_destroy(&log->pages);
}

/* The device wrote. Under lock. */
void ferrydev_dma_log_note(struct ferrydev *fdev, unsigned long iova, size_t len)
{
	struct ferrydev_dma_log *log = &fdev->dma_log;
	unsigned long page, first = iova, last = iova + len - 1;
	void *mark = xa_mk_value(LOG_WRITTEN);
	u32 i;

	if (!log->active || ferrydev_has(fdev, FERRYDEV_DMA_LOG_BLIND))
		return;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_L10))
		mark = xa_mk_value(LOG_LATE);

	for (i = 0; i < log->nr_ranges; i++) {
		const struct ferrydev_dma_range *range = &log->ranges[i];

		if (range->first > last || range->last < first)
			continue;
		for (page = max(first, range->first) >> LOG_PAGE_SHIFT;
		     page <= min(last, range->last) >> LOG_PAGE_SHIFT; page++)
			if (xa_err(xa_store(&log->pages, page, mark, GFP_KERNEL)))
				log->incomplete = true;
	}
}

static int log_start(struct ferrydev *fdev, struct rb_root_cached *ranges,
		     u32 nnodes, u64 *page_size)
{
	struct ferrydev_dma_log *log = &fdev->dma_log;
	struct interval_tree_node *node;
	u32 i = 0;

	if (!is_power_of_2(*page_size))
		return -EINVAL;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_L1) && nnodes > 8)
		return -E2BIG;
	if (log->active) {
		if (!ferrydev_has(fdev, FERRYDEV_BREAK_L4))
			return -EINVAL;
		ferrydev_dma_log_end(fdev);
	}

	log->ranges = kcalloc(nnodes, sizeof(*log->ranges), GFP_KERNEL_ACCOUNT);
	if (!log->ranges)
		return -ENOMEM;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node && i < nnodes;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX), i++) {
		/* The core lets empty ranges through: they end before they begin. */
		if (node->last == node->start - 1) {
			ferrydev_dma_log_end(fdev);
			return -EINVAL;
		}
		log->ranges[i].first = node->start;
		log->ranges[i].last = node->last;
	}
	log->nr_ranges = i;
	log->active = true;
	*page_size = ferrydev_has(fdev, FERRYDEV_BREAK_L3) ? 0 : LOG_PAGE_BYTES;
	return 0;
}

static int ferrydev_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges,
			      u32 nnodes, u64 *page_size)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	int rc;

	mutex_lock(&fdev->state_mutex);
	mutex_lock(&fdev->lock);
	rc = log_start(fdev, ranges, nnodes, page_size);
	mutex_unlock(&fdev->lock);
	ferrydev_state_unlock(fdev);
	return rc;
}

static int ferrydev_log_stop(struct vfio_device *vdev)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	int rc = 0;

	mutex_lock(&fdev->state_mutex);
	mutex_lock(&fdev->lock);
	if (fdev->dma_log.active)
		ferrydev_dma_log_end(fdev);
	else if (!ferrydev_has(fdev, FERRYDEV_BREAK_L4))
		rc = -EINVAL;
	mutex_unlock(&fdev->lock);
	ferrydev_state_unlock(fdev);
	return rc;
}

static int log_report(struct ferrydev *fdev, unsigned long iova, unsigned long length,
		      struct iova_bitmap *dirty)
{
	struct ferrydev_dma_log *log = &fdev->dma_log;
	unsigned long last = iova + length - 1;
	unsigned long page, first, end;
	void *entry;

	if (!log->active)
		return ferrydev_has(fdev, FERRYDEV_BREAK_L8) ? 0 : -EINVAL;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_L5) && !ferrydev_is_active(fdev))
		return -EINVAL;
	/* What was not noted cannot be told: the caller must take all as dirty. */
	if (log->incomplete)
		return -ENOMEM;

	xa_for_each_range(&log->pages, page, entry, iova >> LOG_PAGE_SHIFT,
			  last >> LOG_PAGE_SHIFT) {
		if (xa_to_value(entry) == LOG_LATE) {
			xa_store(&log->pages, page, xa_mk_value(LOG_WRITTEN), GFP_KERNEL);
			continue;
		}
		first = max(page << LOG_PAGE_SHIFT, iova);
		end = min((page << LOG_PAGE_SHIFT) + LOG_PAGE_BYTES - 1, last);
		if (ferrydev_has(fdev, FERRYDEV_BREAK_L7_SHIFT)) {
			if (last - end >= LOG_PAGE_BYTES)
				first += LOG_PAGE_BYTES;
			else if (first - iova >= LOG_PAGE_BYTES)
				first -= LOG_PAGE_BYTES;
			end = first;
		}
		iova_bitmap_set(dirty, first, end - first + 1);
		if (!ferrydev_has(fdev, FERRYDEV_BREAK_L7))
			xa_erase(&log->pages, page);
	}
	return 0;
}

/* The core calls this piece by piece; pieces begin and end with whole bits. */
static int ferrydev_log_read_and_clear(struct vfio_device *vdev, unsigned long iova,
				       unsigned long length, struct iova_bitmap *dirty)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	int rc = 0;

	mutex_lock(&fdev->state_mutex);
	ferrydev_pass(fdev, FERRYDEV_REPORT_MS);
	mutex_lock(&fdev->lock);
	if (length)
		rc = log_report(fdev, iova, length, dirty);
	mutex_unlock(&fdev->lock);
	ferrydev_state_unlock(fdev);
	return rc;
}

const struct vfio_log_ops ferrydev_log_ops = {
	.log_start = ferrydev_log_start,
	.log_stop = ferrydev_log_stop,
	.log_read_and_clear = ferrydev_log_read_and_clear,
};
