// SPDX-License-Identifier: GPL-2.0-only
/*
 * Module, mdev driver, sysfs, and the device as the core opens and closes it.
 *
 *   echo UUID > /sys/class/mdev_bus/ferrydev/mdev_supported_types/ferrydev-1/create
 *   echo 268435456 > /sys/bus/mdev/devices/UUID/ferrydev/state_bytes
 *
 * Settings are module parameters (defaults for devices made afterwards) and
 * attributes of each device; those of its shape are taken when it is opened.
 */

#include <linux/device.h>
#include <linux/module.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "ferrydev.h"

#define FERRYDEV_INSTANCES	64

#define MS_MAX		3600000

struct workqueue_struct *ferrydev_wq;

static unsigned long long defaults[FERRYDEV_SETTINGS] = {
	[FERRYDEV_STATE_BYTES] = SZ_8M,
	[FERRYDEV_CONFIG_BYTES] = SZ_256K,
	[FERRYDEV_CONFIG_BYTES_MAX] = SZ_64M,
	[FERRYDEV_STOP_ONLY_BYTES] = SZ_64K,
};

static char *quirks = "";
module_param(quirks, charp, 0644);
MODULE_PARM_DESC(quirks, "Deviations of new devices, separated by spaces");

struct setting_attr {
	struct device_attribute attr;
	enum ferrydev_setting setting;
	u64 max;
};

static ssize_t setting_show(struct device *dev, struct device_attribute *attr, char *page)
{
	struct setting_attr *sattr = container_of(attr, struct setting_attr, attr);
	struct ferrydev *fdev = dev_get_drvdata(dev);

	return sysfs_emit(page, "%llu\n", fdev->settings[sattr->setting]);
}

static ssize_t setting_store(struct device *dev, struct device_attribute *attr,
			     const char *page, size_t len)
{
	struct setting_attr *sattr = container_of(attr, struct setting_attr, attr);
	struct ferrydev *fdev = dev_get_drvdata(dev);
	u64 value;
	int rc;

	rc = kstrtou64(page, 0, &value);
	if (rc)
		return rc;
	if (value > sattr->max)
		return -ERANGE;

	mutex_lock(&fdev->lock);
	if (fdev->open && sattr->setting < FERRYDEV_DIRTY_BYTES_PER_S) {
		rc = -EBUSY;
	} else {
		fdev->settings[sattr->setting] = value;
		ferrydev_restart_pace(fdev);
		ferrydev_kick(fdev);
	}
	mutex_unlock(&fdev->lock);
	return rc ?: len;
}

#define SETTING(_name, _setting, _max, _what)						\
	module_param_named(_name, defaults[_setting], ullong, 0644);			\
	MODULE_PARM_DESC(_name, _what);							\
	static struct setting_attr setting_##_name = {					\
		.attr = __ATTR(_name, 0644, setting_show, setting_store),		\
		.setting = _setting,							\
		.max = _max,								\
	}

SETTING(state_bytes, FERRYDEV_STATE_BYTES, SZ_4G,
	"Device state at power-on, configuration and bulk");
SETTING(config_bytes, FERRYDEV_CONFIG_BYTES, SZ_1G,
	"Configuration at power-on: the initial bytes, whole KiB");
SETTING(config_bytes_max, FERRYDEV_CONFIG_BYTES_MAX, SZ_1G,
	"Largest configuration that the guest can make");
SETTING(stop_only_bytes, FERRYDEV_STOP_ONLY_BYTES, SZ_4G,
	"Bulk state that only STOP_COPY reads");
SETTING(dirty_bytes_per_s, FERRYDEV_DIRTY_BYTES_PER_S, SZ_1G * 1024ULL,
	"Bulk state that the device rewrites by itself while it works");
SETTING(to_precopy_ms, FERRYDEV_TO_PRECOPY_MS, MS_MAX, "Time of arcs into PRE_COPY");
SETTING(to_p2p_ms, FERRYDEV_TO_P2P_MS, MS_MAX, "Time of arcs into the P2P states");
SETTING(to_stop_ms, FERRYDEV_TO_STOP_MS, MS_MAX, "Time of arcs out of work");
SETTING(to_running_ms, FERRYDEV_TO_RUNNING_MS, MS_MAX, "Time of arcs into work");
SETTING(save_ms, FERRYDEV_SAVE_MS, MS_MAX, "Time of the final save, on top");
SETTING(load_ms, FERRYDEV_LOAD_MS, MS_MAX, "Time of RESUMING to STOP");
SETTING(reset_ms, FERRYDEV_RESET_MS, MS_MAX, "Time of a reset");
SETTING(info_ms, FERRYDEV_INFO_MS, MS_MAX, "Time of PRECOPY_INFO");
SETTING(data_size_ms, FERRYDEV_DATA_SIZE_MS, MS_MAX, "Time of MIG_DATA_SIZE");
SETTING(report_ms, FERRYDEV_REPORT_MS, MS_MAX, "Time of a DMA logging report");

static ssize_t quirks_show(struct device *dev, struct device_attribute *attr, char *page)
{
	struct ferrydev *fdev = dev_get_drvdata(dev);
	ssize_t len;

	mutex_lock(&fdev->lock);
	len = ferrydev_quirks_print(&fdev->quirks, page);
	mutex_unlock(&fdev->lock);
	return len;
}

/*
 * The core takes mig_ops for fixed, and so may debugfs: a device without
 * migration is not to be had there.
 */
static bool quirks_fit(const struct ferrydev_quirks *quirks)
{
	return !IS_ENABLED(CONFIG_VFIO_DEBUGFS) ||
	       !test_bit(FERRYDEV_NO_MIGRATION, quirks->on);
}

static ssize_t quirks_store(struct device *dev, struct device_attribute *attr,
			    const char *page, size_t len)
{
	struct ferrydev *fdev = dev_get_drvdata(dev);
	struct ferrydev_quirks *parsed;
	int rc;

	parsed = kzalloc_obj(*parsed);
	if (!parsed)
		return -ENOMEM;
	rc = ferrydev_quirks_parse(parsed, page);
	if (!rc && !quirks_fit(parsed))
		rc = -EOPNOTSUPP;
	if (!rc) {
		mutex_lock(&fdev->lock);
		fdev->quirks = *parsed;
		ferrydev_kick(fdev);
		mutex_unlock(&fdev->lock);
	}
	kfree(parsed);
	return rc ?: len;
}
static DEVICE_ATTR_RW(quirks);

static ssize_t quirk_names_show(struct device *dev, struct device_attribute *attr, char *page)
{
	return ferrydev_quirks_names(page);
}
static DEVICE_ATTR_RO(quirk_names);

static ssize_t mig_state_show(struct device *dev, struct device_attribute *attr, char *page)
{
	struct ferrydev *fdev = dev_get_drvdata(dev);

	return sysfs_emit(page, "%s\n", ferrydev_state_name(READ_ONCE(fdev->mig_state)));
}
static DEVICE_ATTR_RO(mig_state);

/* Holds the device up for as long as it takes: meant for a stopped one. */
static ssize_t state_digest_show(struct device *dev, struct device_attribute *attr, char *page)
{
	struct ferrydev *fdev = dev_get_drvdata(dev);
	u8 digest[FERRYDEV_DIGEST_BYTES];
	void *scratch;
	int rc = 0;

	scratch = kvmalloc(FERRYDEV_PAYLOAD_BYTES_MAX, GFP_KERNEL);
	if (!scratch)
		return -ENOMEM;
	mutex_lock(&fdev->lock);
	if (fdev->open)
		ferrydev_state_digest(fdev, digest, scratch);
	else
		rc = -ENODATA;
	mutex_unlock(&fdev->lock);
	kvfree(scratch);
	return rc ?: sysfs_emit(page, "%*phN\n", FERRYDEV_DIGEST_BYTES, digest);
}
static DEVICE_ATTR_RO(state_digest);

static struct attribute *ferrydev_attrs[] = {
	&setting_state_bytes.attr.attr,
	&setting_config_bytes.attr.attr,
	&setting_config_bytes_max.attr.attr,
	&setting_stop_only_bytes.attr.attr,
	&setting_dirty_bytes_per_s.attr.attr,
	&setting_to_precopy_ms.attr.attr,
	&setting_to_p2p_ms.attr.attr,
	&setting_to_stop_ms.attr.attr,
	&setting_to_running_ms.attr.attr,
	&setting_save_ms.attr.attr,
	&setting_load_ms.attr.attr,
	&setting_reset_ms.attr.attr,
	&setting_info_ms.attr.attr,
	&setting_data_size_ms.attr.attr,
	&setting_report_ms.attr.attr,
	&dev_attr_quirks.attr,
	&dev_attr_quirk_names.attr,
	&dev_attr_mig_state.attr,
	&dev_attr_state_digest.attr,
	NULL,
};

static const struct attribute_group ferrydev_group = {
	.name = "ferrydev",
	.attrs = ferrydev_attrs,
};

static const struct attribute_group *ferrydev_groups[] = {
	&ferrydev_group,
	NULL,
};

/*
 * Lets a time pass. The device does not notice; a caller that is being killed
 * does not wait.
 */
void ferrydev_pass_ms(u64 ms)
{
	if (ms)
		schedule_timeout_killable(msecs_to_jiffies(ms));
}

void ferrydev_pass(const struct ferrydev *fdev, enum ferrydev_setting time)
{
	ferrydev_pass_ms(fdev->settings[time]);
}

/* Everything but the migration state, as after power-on. Under lock. */
void ferrydev_power_on(struct ferrydev *fdev)
{
	ferrydev_state_power_on(fdev);
	if (!fdev->open || !ferrydev_has(fdev, FERRYDEV_BREAK_H6)) {
		ferrydev_function_reset(fdev);
		ferrydev_irqs_reset(fdev);
	}
	ferrydev_restart_pace(fdev);
	fdev->wedged = false;
}

static u32 migration_flags(const struct ferrydev *fdev)
{
	u32 flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY;

	if (ferrydev_has(fdev, FERRYDEV_NO_P2P))
		flags &= ~VFIO_MIGRATION_P2P;
	if (ferrydev_has(fdev, FERRYDEV_NO_PRECOPY))
		flags &= ~VFIO_MIGRATION_PRE_COPY;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_D1))
		flags &= ~VFIO_MIGRATION_STOP_COPY;
	if (ferrydev_has(fdev, FERRYDEV_BREAK_D2))
		flags |= BIT(3);
	return flags;
}

/*
 * What the device can do. A driver sets this in init and never again; here it
 * follows from quirks that may change until the device is opened, and the core
 * looks at it through an open device only.
 */
static void take_shape(struct ferrydev *fdev)
{
	struct ferrydev_geometry *geometry = &fdev->geometry;
	u64 *settings = fdev->settings;
	u64 config_kib = settings[FERRYDEV_CONFIG_BYTES] / 1024;

	geometry->config_kib = config_kib;
	geometry->config_kib_max = max(config_kib, settings[FERRYDEV_CONFIG_BYTES_MAX] / 1024);
	geometry->bulk_bytes = settings[FERRYDEV_STATE_BYTES];
	geometry->bulk_bytes -= min(geometry->bulk_bytes, config_kib * 1024);
	geometry->stop_only_bytes = settings[FERRYDEV_STOP_ONLY_BYTES];

	if (ferrydev_has(fdev, FERRYDEV_NO_MIGRATION)) {
		fdev->vdev.migration_flags = 0;
		fdev->vdev.mig_ops = NULL;
	} else {
		fdev->vdev.migration_flags = migration_flags(fdev);
		fdev->vdev.mig_ops = &ferrydev_migration_ops;
	}
	fdev->vdev.log_ops = &ferrydev_log_ops;
	if (!fdev->vdev.mig_ops || ferrydev_has(fdev, FERRYDEV_NO_DMA_LOGGING))
		fdev->vdev.log_ops = NULL;
}

static int ferrydev_open(struct vfio_device *vdev)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	int rc;

	mutex_lock(&fdev->lock);
	take_shape(fdev);
	rc = ferrydev_state_alloc(fdev);
	if (!rc) {
		ferrydev_power_on(fdev);
		fdev->mig_state = VFIO_DEVICE_STATE_RUNNING;
		if (ferrydev_has(fdev, FERRYDEV_BREAK_D7))
			fdev->mig_state = VFIO_DEVICE_STATE_STOP;
		fdev->mig_state_before = 0;
		fdev->deferred_reset = false;
		fdev->size_object = false;
		fdev->loaded_in_set = 0;
		fdev->open = true;
		ferrydev_kick(fdev);
	}
	mutex_unlock(&fdev->lock);
	return rc;
}

static void ferrydev_close(struct vfio_device *vdev)
{
	struct ferrydev *fdev = to_ferrydev(vdev);

	mutex_lock(&fdev->lock);
	fdev->open = false;
	mutex_unlock(&fdev->lock);
	cancel_delayed_work_sync(&fdev->work);

	/* The data_fd may stay with the user; it answers ENODEV from here on. */
	mutex_lock(&fdev->state_mutex);
	ferrydev_end_session(fdev);
	mutex_lock(&fdev->lock);
	fdev->mig_state = VFIO_DEVICE_STATE_RUNNING;
	ferrydev_irqs_reset(fdev);
	ferrydev_dma_log_end(fdev);
	ferrydev_state_free(fdev);
	mutex_unlock(&fdev->lock);
	ferrydev_state_unlock(fdev);
}

static long get_info(void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long get_irq_info(void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;
	int rc;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	rc = ferrydev_irq_info(&info);
	if (rc)
		return rc;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long ferrydev_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct ferrydev *fdev = to_ferrydev(vdev);

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return get_info((void __user *)arg);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return get_irq_info((void __user *)arg);
	case VFIO_DEVICE_SET_IRQS:
		return ferrydev_set_irqs(fdev, (void __user *)arg);
	case VFIO_DEVICE_RESET:
		return ferrydev_reset(fdev);
	default:
		return -ENOTTY;
	}
}

/* Features that the core does not know. The device has none. */
static int ferrydev_device_feature(struct vfio_device *vdev, u32 flags,
				   void __user *arg, size_t argsz)
{
	return ferrydev_has(to_ferrydev(vdev), FERRYDEV_BREAK_D6) ? 0 : -ENOTTY;
}

static int ferrydev_init_device(struct vfio_device *vdev)
{
	struct ferrydev *fdev = to_ferrydev(vdev);
	unsigned int i;
	int rc;

	for (i = 0; i < FERRYDEV_SETTINGS; i++)
		fdev->settings[i] = defaults[i];
	rc = ferrydev_quirks_parse(&fdev->quirks, quirks);
	if (rc || !quirks_fit(&fdev->quirks))
		return rc ?: -EOPNOTSUPP;
	mutex_init(&fdev->state_mutex);
	spin_lock_init(&fdev->reset_lock);
	mutex_init(&fdev->lock);
	INIT_DELAYED_WORK(&fdev->work, ferrydev_work);
	ferrydev_dma_log_init(fdev);
	fdev->mig_state = VFIO_DEVICE_STATE_RUNNING;
	take_shape(fdev);
	return 0;
}

static void ferrydev_release_device(struct vfio_device *vdev)
{
	struct ferrydev *fdev = to_ferrydev(vdev);

	mutex_destroy(&fdev->lock);
	mutex_destroy(&fdev->state_mutex);
}

static const struct vfio_device_ops ferrydev_ops = {
	.name = "vfio-ferrydev",
	.init = ferrydev_init_device,
	.release = ferrydev_release_device,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
	.open_device = ferrydev_open,
	.close_device = ferrydev_close,
	.read = ferrydev_region_read,
	.write = ferrydev_region_write,
	.ioctl = ferrydev_ioctl,
	.get_region_info_caps = ferrydev_region_info,
	.device_feature = ferrydev_device_feature,
};

static int ferrydev_probe(struct mdev_device *mdev)
{
	struct ferrydev *fdev;
	int rc;

	fdev = vfio_alloc_device(ferrydev, vdev, &mdev->dev, &ferrydev_ops);
	if (IS_ERR(fdev))
		return PTR_ERR(fdev);
	dev_set_drvdata(&mdev->dev, fdev);
	rc = vfio_register_emulated_iommu_dev(&fdev->vdev);
	if (rc)
		vfio_put_device(&fdev->vdev);
	return rc;
}

static void ferrydev_remove(struct mdev_device *mdev)
{
	struct ferrydev *fdev = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&fdev->vdev);
	vfio_put_device(&fdev->vdev);
}

static struct mdev_driver ferrydev_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = FERRYDEV_INSTANCES,
	.probe = ferrydev_probe,
	.remove = ferrydev_remove,
	.driver = {
		.name = "ferrydev",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = ferrydev_groups,
	},
};

/* The class gives the type its name, ferrydev-1. */
static const struct class ferrydev_class = {
	.name = "ferrydev",
};

static struct mdev_type ferrydev_type = {
	.sysfs_name = "1",
	.pretty_name = "Migratable test device",
};

static struct mdev_type *ferrydev_types[] = { &ferrydev_type };
static struct mdev_parent ferrydev_parent;
static struct device *ferrydev_parent_dev;

static int __init ferrydev_module_init(void)
{
	int rc;

	ferrydev_wq = alloc_workqueue("ferrydev", WQ_UNBOUND, 0);
	if (!ferrydev_wq)
		return -ENOMEM;
	rc = mdev_register_driver(&ferrydev_driver);
	if (rc)
		goto destroy_wq;
	rc = class_register(&ferrydev_class);
	if (rc)
		goto unregister_driver;
	ferrydev_parent_dev = device_create(&ferrydev_class, NULL, 0, NULL, "ferrydev");
	if (IS_ERR(ferrydev_parent_dev)) {
		rc = PTR_ERR(ferrydev_parent_dev);
		goto unregister_class;
	}
	rc = mdev_register_parent(&ferrydev_parent, ferrydev_parent_dev, &ferrydev_driver,
				  ferrydev_types, ARRAY_SIZE(ferrydev_types));
	if (rc)
		goto unregister_parent_dev;
	return 0;

unregister_parent_dev:
	device_unregister(ferrydev_parent_dev);
unregister_class:
	class_unregister(&ferrydev_class);
unregister_driver:
	mdev_unregister_driver(&ferrydev_driver);
destroy_wq:
	destroy_workqueue(ferrydev_wq);
	return rc;
}

static void __exit ferrydev_module_exit(void)
{
	mdev_unregister_parent(&ferrydev_parent);
	device_unregister(ferrydev_parent_dev);
	class_unregister(&ferrydev_class);
	mdev_unregister_driver(&ferrydev_driver);
	destroy_workqueue(ferrydev_wq);
}

module_init(ferrydev_module_init);
module_exit(ferrydev_module_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("VFIO test device with all of migration v2");
MODULE_AUTHOR("The vmferry authors");
MODULE_IMPORT_NS("IOMMUFD");
