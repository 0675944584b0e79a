//! The units that depend on a disk as a block device of this host, `/dev/flexnbd/NAME`: the drop-in of
//! `flexnbd-attach@NAME.service`, and the link by which the device starts it. Pure.
//!
//! The names of the device's units are escaped paths, which a template cannot form from its instance.

use super::{Line, TEMPLATES};
use flexnbd::systemd::unit::device_unit;

/// Directory of the devices; `systemd/flexnbd.rules` makes links in it.
const DEVICES: &str = "/dev/flexnbd";

/// The settings of `flexnbd-attach@NAME.service`, whose disk `{unit}@NAME.service` serves.
///
/// Requires the socket, which stays open while the service restarts, and not the service: systemd would
/// propagate its restart, and systemd 257 does so for `StopPropagatedFrom=`, too. The order of
/// `After=` is reversed at a stop, so the device is detached before its server ends.
///
/// File systems and swap wait for `blockdev@DEVICE.target` (systemd.special(7)), so that they are
/// unmounted before the device is detached.
pub(crate) fn attach(name: &str, unit: &str) -> Vec<Line> {
    let (socket, service) = (format!("{unit}@{name}.socket"), format!("{unit}@{name}.service"));
    let device = device_unit(&format!("{DEVICES}/{name}"));
    let target = format!("blockdev@{}.target", device.trim_end_matches(".device"));
    vec![
        ("Unit", format!("Requires={socket}")),
        ("Unit", format!("After={socket} {service}")),
        ("Unit", format!("Wants={target}")),
        ("Unit", format!("Before={target}")),
        ("Service", format!("Environment=SOCKET_UNIT={socket}")),
    ]
}

/// The link by which everything that requires the device starts `flexnbd-attach@NAME.service`: path and
/// target.
pub(crate) fn device_link(name: &str) -> (String, String) {
    let device = device_unit(&format!("{DEVICES}/{name}"));
    let link = format!("{device}.requires/flexnbd-attach@{name}.service");
    (link, format!("{TEMPLATES}/flexnbd-attach@.service"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_the_device_are_named_as_by_systemd() {
        let (path, target) = device_link("my-disk");
        assert_eq!(path, "dev-flexnbd-my\\x2ddisk.device.requires/flexnbd-attach@my-disk.service");
        assert_eq!(target, "/usr/lib/systemd/system/flexnbd-attach@.service");
        let lines = attach("my-disk", "flexnbd");
        let wanted = "Wants=blockdev@dev-flexnbd-my\\x2ddisk.target";
        assert!(lines.contains(&("Unit", wanted.to_owned())), "{lines:?}");
    }

    #[test]
    fn restarts_of_the_service_are_not_propagated() {
        let lines = attach("disk", "flexnbd");
        let naming = |unit: &str| -> Vec<&str> {
            let names = lines.iter().filter(|(_, line)| line.ends_with(unit));
            names.map(|(_, line)| line.split('=').next().unwrap()).collect()
        };
        assert_eq!(naming("flexnbd@disk.service"), ["After"]);
        assert_eq!(naming("flexnbd@disk.socket"), ["Requires", "Environment"]);
    }
}
