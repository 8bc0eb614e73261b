// SPDX-License-Identifier: GPL-2.0-only
/*
 * The data_fd: read or write, poll, PRECOPY_INFO.
 *
 * The file belongs to the user and may outlive its session, even the close of
 * the device: it keeps the device's memory, and answers ENODEV once it is dead.
 * User memory is never copied under fdev->lock: a page that somebody else has to
 * bring must not stop the device.
 */

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/poll.h>
#include <linux/slab.h>

#include "ferrydev.h"

/* What a driver of the field claimed (QEMU commit 7c20d5f31d). */
#define GARBAGE_INITIAL		18446744073708667040ULL

/* The session ended: whoever waits is told. Under fdev->lock. */
void ferrydev_file_kill(struct ferrydev_file *migf)
{
	migf->dead = true;
	wake_up_interruptible(&migf->wait);
}

static int file_release(struct inode *inode, struct file *filp)
{
	struct ferrydev_file *migf = filp->private_data;

	ferrydev_saver_free(migf->saver);
	ferrydev_loader_free(migf->loader);
	mutex_destroy(&migf->lock);
	vfio_put_device(&migf->fdev->vdev);
	kfree(migf);
	return 0;
}

/* read-fails, write-fails: the device fails after so many bytes. */
static bool fails_now(struct ferrydev_file *migf, enum ferrydev_quirk quirk)
{
	return ferrydev_has(migf->fdev, quirk) &&
	       migf->moved >= migf->fdev->quirks.arg[quirk];
}

/* How much there is at @from: see ferrydev_saver_peek(). */
static ssize_t peek(struct ferrydev_file *migf, const u8 **from)
{
	struct ferrydev *fdev = migf->fdev;
	ssize_t len;

	mutex_lock(&fdev->lock);
	if (migf->dead)
		len = -ENODEV;
	else
		len = ferrydev_saver_peek(migf->saver, fdev, from);
	mutex_unlock(&fdev->lock);
	return len;
}

static ssize_t save_read(struct file *filp, char __user *buf, size_t len, loff_t *pos)
{
	struct ferrydev_file *migf = filp->private_data;
	struct ferrydev *fdev = migf->fdev;
	bool loses = ferrydev_has(fdev, FERRYDEV_BREAK_S8) && len < 64;
	bool again = true;
	ssize_t done = 0, rc = 0, there;
	const u8 *from;

	if (pos && !ferrydev_has(fdev, FERRYDEV_BREAK_X3_SEEK))
		return -ESPIPE;
	if (ferrydev_has(fdev, FERRYDEV_SHORT_READS)) {
		len = min_t(size_t, len, fdev->quirks.arg[FERRYDEV_SHORT_READS]);
		again = false;
	}

	mutex_lock(&migf->lock);
	while (len) {
		if (fails_now(migf, FERRYDEV_READ_FAILS)) {
			rc = -ENODEV;
			break;
		}
		there = peek(migf, &from);
		if (there <= 0) {
			rc = there;
			break;
		}
		rc = min_t(size_t, there, len);
		if (copy_to_user(buf, from, rc)) {
			rc = -EFAULT;
			break;
		}
		ferrydev_saver_advance(migf->saver, loses ? there : rc);
		migf->moved += rc;
		buf += rc;
		len -= rc;
		done += rc;
		if (!again || signal_pending(current))
			break;
		cond_resched();
	}
	mutex_unlock(&migf->lock);
	if (!done && !rc && len && ferrydev_has(fdev, FERRYDEV_BREAK_F2))
		ferrydev_quirk_after_end(fdev);
	/* What was read is the caller's; an error comes with the next read. */
	return done ?: rc;
}

/* What there is to read, or that it is over. */
static __poll_t save_poll(struct file *filp, struct poll_table_struct *wait)
{
	struct ferrydev_file *migf = filp->private_data;
	struct ferrydev *fdev = migf->fdev;
	__poll_t events = 0;

	poll_wait(filp, &migf->wait, wait);
	mutex_lock(&migf->lock);
	mutex_lock(&fdev->lock);
	if (migf->dead || fails_now(migf, FERRYDEV_READ_FAILS))
		events = EPOLLIN | EPOLLRDNORM | EPOLLRDHUP;
	else if (ferrydev_has(fdev, FERRYDEV_NO_POLL) ||
		 ferrydev_saver_readable(migf->saver, fdev))
		events = EPOLLIN | EPOLLRDNORM;
	mutex_unlock(&fdev->lock);
	mutex_unlock(&migf->lock);
	return events;
}

/* Answers the caller's struct with what applies to it. */
static void answer_precopy(struct ferrydev *fdev, const struct ferrydev_precopy *found,
			   u32 caller_flags, struct vfio_precopy_info *info)
{
	bool opted_in = fdev->vdev.precopy_info_v2;
	bool one_field = ferrydev_has(fdev, FERRYDEV_ONE_SIZE_FIELD);
	bool back;

	if (opted_in)
		back = ferrydev_has(fdev, FERRYDEV_BREAK_R2);
	else
		back = ferrydev_has(fdev, FERRYDEV_CALLER_FLAGS_BACK);
	/* The common check leaves a v1 caller's flags; a driver need not. */
	info->flags = back ? caller_flags : 0;
	if (!opted_in && ferrydev_has(fdev, FERRYDEV_BREAK_P6))
		info->flags |= BIT(8);
	if (found->reinit)
		info->flags |= VFIO_PRECOPY_INFO_REINIT;

	if (!one_field || found->initial_bytes)
		info->initial_bytes = found->initial_bytes;
	if (!one_field || !found->initial_bytes)
		info->dirty_bytes = found->dirty_bytes;
	if (ferrydev_has(fdev, FERRYDEV_SIZE) &&
	    fdev->quirks.arg[FERRYDEV_SIZE] == FERRYDEV_SIZE_GARBAGE)
		info->initial_bytes = GARBAGE_INITIAL;
}

static int precopy_info(struct ferrydev_file *migf, u32 caller_flags,
			struct vfio_precopy_info *info)
{
	struct ferrydev *fdev = migf->fdev;
	struct ferrydev_precopy found = {};
	int rc = 0;

	lockdep_assert_held(&fdev->state_mutex);
	ferrydev_pass(fdev, FERRYDEV_INFO_MS);
	if (!ferrydev_is_precopy(fdev)) {
		if (!ferrydev_has(fdev, FERRYDEV_BREAK_P2))
			return -EINVAL;
		info->initial_bytes = 0;
		info->dirty_bytes = 0;
		return 0;
	}
	if (fdev->mig_state == VFIO_DEVICE_STATE_PRE_COPY_P2P &&
	    ferrydev_has(fdev, FERRYDEV_NO_INFO_IN_P2P))
		return -EINVAL;
	if (ferrydev_has(fdev, FERRYDEV_INFO_FAILS))
		return -EIO;

	mutex_lock(&migf->lock);
	mutex_lock(&fdev->lock);
	if (migf->dead)
		rc = -ENODEV;
	else
		ferrydev_saver_info(migf->saver, fdev, &found);
	mutex_unlock(&fdev->lock);
	mutex_unlock(&migf->lock);
	if (!rc)
		answer_precopy(fdev, &found, caller_flags, info);
	return rc;
}

/* As vfio_check_precopy_ioctl(), which drivers use, but for quirks. */
static int check_precopy_ioctl(struct ferrydev *fdev, unsigned int cmd, unsigned long arg,
			       struct vfio_precopy_info *info)
{
	unsigned long minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);

	if (ferrydev_has(fdev, FERRYDEV_NO_PRECOPY_INFO))
		return -ENOTTY;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_P1))
		cmd = VFIO_MIG_GET_PRECOPY_INFO;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_P3)) {
		/* The caller's argsz and pointer are not looked at. */
		if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
			return -ENOTTY;
		if (copy_from_user(info, (void __user *)arg, minsz))
			memset(info, 0, sizeof(*info));
		return 0;
	}
	return vfio_check_precopy_ioctl(&fdev->vdev, cmd, arg, info);
}

static long save_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	unsigned long minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct ferrydev_file *migf = filp->private_data;
	struct ferrydev *fdev = migf->fdev;
	struct vfio_precopy_info info = {};
	u32 caller_flags;
	int rc;

	rc = check_precopy_ioctl(fdev, cmd, arg, &info);
	if (rc)
		return rc;
	/* The check cleared the flags of a v2 caller: only break-R2 wants them. */
	caller_flags = info.flags;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_R2) &&
	    get_user(caller_flags, &((struct vfio_precopy_info __user *)arg)->flags))
		return -EFAULT;

	mutex_lock(&fdev->state_mutex);
	rc = precopy_info(migf, caller_flags, &info);
	ferrydev_state_unlock(fdev);
	if (rc)
		return rc;
	if (copy_to_user((void __user *)arg, &info, minsz) &&
	    !ferrydev_has(fdev, FERRYDEV_BREAK_P3))
		return -EFAULT;
	return 0;
}

static ssize_t resume_write(struct file *filp, const char __user *buf, size_t len, loff_t *pos)
{
	struct ferrydev_file *migf = filp->private_data;
	struct ferrydev *fdev = migf->fdev;
	ssize_t done = 0;
	size_t room;
	int rc = 0;
	u8 *to;

	if (pos && !ferrydev_has(fdev, FERRYDEV_BREAK_X3_SEEK))
		return -ESPIPE;
	mutex_lock(&migf->lock);
	while (len && !rc) {
		room = min(ferrydev_loader_room(migf->loader, &to), len);
		if (migf->dead)
			rc = ferrydev_has(fdev, FERRYDEV_BREAK_X4) ? 0 : -ENODEV;
		else if (ferrydev_has(fdev, FERRYDEV_BREAK_X6) && !done &&
			 len < FERRYDEV_HEADER_BYTES)
			rc = -EINVAL;
		else if (fails_now(migf, FERRYDEV_WRITE_FAILS))
			rc = -EIO;
		else if (copy_from_user(to, buf, room))
			rc = -EFAULT;
		if (rc)
			break;
		mutex_lock(&fdev->lock);
		/* A reset may have come while the bytes were copied. */
		if (!migf->dead)
			rc = ferrydev_loader_take(migf->loader, fdev, room);
		mutex_unlock(&fdev->lock);
		if (ferrydev_has(fdev, FERRYDEV_BREAK_X8))
			rc = 0;
		migf->moved += room;
		buf += room;
		len -= room;
		if (!rc)
			done += room;
		cond_resched();
	}
	mutex_unlock(&migf->lock);
	/* What was taken is told; an error stays, and comes with the next write. */
	return done ?: rc;
}

static __poll_t resume_poll(struct file *filp, struct poll_table_struct *wait)
{
	struct ferrydev_file *migf = filp->private_data;

	poll_wait(filp, &migf->wait, wait);
	return EPOLLOUT | EPOLLWRNORM | (READ_ONCE(migf->dead) ? EPOLLERR : 0);
}

/* For break-X3 and break-X5: the other direction is there, and does nothing. */
static ssize_t wrong_read(struct file *filp, char __user *buf, size_t len, loff_t *pos)
{
	return 0;
}

static ssize_t wrong_write(struct file *filp, const char __user *buf, size_t len, loff_t *pos)
{
	return len;
}

static const struct file_operations save_fops = {
	.owner = THIS_MODULE,
	.read = save_read,
	.write = wrong_write,
	.poll = save_poll,
	.unlocked_ioctl = save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = file_release,
};

static const struct file_operations resume_fops = {
	.owner = THIS_MODULE,
	.read = wrong_read,
	.write = resume_write,
	.poll = resume_poll,
	.release = file_release,
};

/* A session's file, before it begins. Its one reference is the caller's. */
struct ferrydev_file *ferrydev_file_new(struct ferrydev *fdev, bool saving, bool precopy)
{
	const struct file_operations *fops = saving ? &save_fops : &resume_fops;
	struct ferrydev_file *migf;
	int rc = -ENOMEM;

	migf = kzalloc_obj(*migf, GFP_KERNEL_ACCOUNT);
	if (!migf)
		return ERR_PTR(-ENOMEM);
	if (saving) {
		migf->saver = ferrydev_saver_new(fdev);
	} else {
		migf->loader = ferrydev_loader_new();
		if (migf->loader && ferrydev_loader_begin(migf->loader, fdev))
			goto free;
	}
	if (!migf->saver && !migf->loader)
		goto free;
	migf->fdev = fdev;
	mutex_init(&migf->lock);
	init_waitqueue_head(&migf->wait);
	migf->filp = anon_inode_getfile("ferrydev_mig", fops, migf,
					saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(migf->filp)) {
		rc = PTR_ERR(migf->filp);
		goto free;
	}
	/* From here on the file's release frees all. */
	get_device(&fdev->vdev.device);
	if (!ferrydev_has(fdev, FERRYDEV_BREAK_X3_SEEK))
		stream_open(migf->filp->f_inode, migf->filp);
	else
		migf->filp->f_mode |= FMODE_PREAD | FMODE_PWRITE | FMODE_LSEEK;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_X3))
		migf->filp->f_flags = (migf->filp->f_flags & ~O_ACCMODE) | O_RDWR;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_X5))
		migf->filp->f_mode |= FMODE_READ | FMODE_CAN_READ | FMODE_WRITE | FMODE_CAN_WRITE;
	return migf;

free:
	ferrydev_saver_free(migf->saver);
	ferrydev_loader_free(migf->loader);
	kfree(migf);
	return ERR_PTR(rc);
}

/* A file of no session, for quirks. */
struct file *ferrydev_file_dead(struct ferrydev *fdev)
{
	struct ferrydev_file *migf = ferrydev_file_new(fdev, true, false);

	if (IS_ERR(migf))
		return ERR_CAST(migf);
	migf->dead = true;
	return migf->filp;
}
