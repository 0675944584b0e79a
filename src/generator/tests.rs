//! Tests of `generator.rs`.

use super::sandbox::STATE;
use super::*;
use proptest::prelude::*;

const PROXY_SOCKET: &str = "flexnbd-proxy@disk.socket.d/00-flexnbd-disk.conf";
const ATTACH: &str = "flexnbd-attach@disk.service.d/00-flexnbd-disk.conf";
const PROXY: &str = "flexnbd-proxy@disk.service.d/00-flexnbd-disk.conf";
const SOCKET: &str = "flexnbd@disk.socket.d/00-flexnbd-disk.conf";
const SERVICE: &str = "flexnbd@disk.service.d/00-flexnbd-disk.conf";
const RECEIVER: &str = "flexnbd-listen@disk.service.d/00-flexnbd-disk.conf";
const BOOT: &str = "multi-user.target.d/00-flexnbd-disk.conf";

fn generate_from(text: &str) -> Generated {
    generate("disk", Path::new("/etc/flexnbd/disk.conf"), Ok(text))
}

/// The settings in a drop-in, without the comment; empty if there is no drop-in.
fn settings<'a>(generated: &'a Generated, path: &str) -> Vec<&'a str> {
    let lines = generated.files.get(path).map(String::as_str).unwrap_or_default().lines();
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// The value of `ListenStream=`, and the error.
fn listen_stream(text: &str) -> (Option<String>, Option<String>) {
    let generated = generate_from(&format!("FILE=/a.img\n{text}"));
    let settings = settings(&generated, SOCKET);
    if settings.is_empty() {
        return (None, generated.error);
    }
    assert_eq!(settings[..2], ["[Socket]", "ListenStream="], "keeps the template's address");
    (settings[2].strip_prefix("ListenStream=").map(str::to_owned), generated.error)
}

fn access(file: &str) -> Vec<String> {
    let generated = generate_from(&format!("FILE={file}"));
    assert_eq!(generated.error, None, "{file}");
    assert_eq!(settings(&generated, SERVICE), settings(&generated, RECEIVER), "{file}");
    settings(&generated, SERVICE).into_iter().map(str::to_owned).collect()
}

#[test]
fn drop_in_names_its_source_and_has_sections() {
    let expected = "# Made by flexnbd-generator from /etc/flexnbd/disk.conf.\n\
        \n[Unit]\nRequiresMountsFor=\"/srv\"\n\
        \n[Service]\nReadWritePaths=\"-/srv\"\n";
    assert_eq!(generate_from("FILE=/srv/a.img").files[SERVICE], expected);
}

#[test]
fn socket_listens_on_address_and_port() {
    for (text, expected) in [
        ("ADDR=::\nPORT=10810", "[::]:10810"),
        ("ADDR=192.0.2.1\nPORT=7", "192.0.2.1:7"),
        ("ADDR=[2001:db8::1]\nPORT=7", "[2001:db8::1]:7"),
        ("ADDR=/run/a b.sock", "/run/a b.sock"),
        ("ADDR=/run/100%n", "/run/100%%n"),
    ] {
        assert_eq!(listen_stream(text), (Some(expected.to_owned()), None), "{text}");
    }
    assert_eq!(listen_stream(""), (None, None), "overrides the template without need");
}

#[test]
fn invalid_address_does_not_fall_back_to_the_default() {
    for (text, expected) in [
        ("PORT=7", "/etc/flexnbd/disk.conf: PORT needs ADDR as well"),
        ("ADDR=::\nPORT=0", "/etc/flexnbd/disk.conf: PORT: a socket unit needs a port that"),
        ("ADDR=::\nPORT=x", "/etc/flexnbd/disk.conf, line 3: PORT: `x` is not a port"),
        ("ADDR='/a '", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a "),
        ("ADDR=/a\\", "/etc/flexnbd/disk.conf: ADDR: a socket unit cannot listen on /a\\"),
        ("ADDR=/a/../b", "/etc/flexnbd/disk.conf: ADDR: /a/../b: a path with .. in it"),
        ("WHAT=1", "/etc/flexnbd/disk.conf, line 2: unknown key WHAT"),
    ] {
        let (address, error) = listen_stream(text);
        assert_eq!(address.as_deref(), Some("/run/flexnbd/disk.none"), "{text}");
        let error = error.unwrap();
        assert!(error.starts_with(expected), "{error}");
    }
    let path = |bytes: usize| format!("ADDR=/{}", "x".repeat(bytes - 1));
    assert_eq!(listen_stream(&path(107)).1, None);
    assert!(listen_stream(&path(108)).1.unwrap().contains("cannot listen"));
}

#[test]
fn configuration_error_keeps_the_units_unchanged() {
    let good = generate_from("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\n");
    let bad = generate_from("ADDR=::\nPORT=7\nFILE=/srv/a\nAUTOSTART=yes\nPROT=8\n");
    assert_eq!((&good.files, &good.links), (&bad.files, &bad.links));
    let error = "/etc/flexnbd/disk.conf, line 5: unknown key PROT; perhaps PORT is meant";
    assert_eq!((good.error, bad.error.as_deref()), (None, Some(error)));
}

#[test]
fn unreadable_configuration_gets_an_unused_socket() {
    let file = Path::new("/etc/flexnbd/disk.conf");
    let generated = generate("disk", file, Err("not a regular file".to_owned()));
    let error = "/etc/flexnbd/disk.conf: not a regular file";
    assert_eq!(generated.error.as_deref(), Some(error));
    for socket in [SOCKET, PROXY_SOCKET] {
        assert_eq!(settings(&generated, socket)[2], "ListenStream=/run/flexnbd/disk.none");
    }
    assert_eq!((generated.files.len(), generated.links.len()), (2, 0));
}

#[test]
fn service_may_write_only_the_images_directory() {
    let mounts = |at| format!("RequiresMountsFor=\"{at}\"");
    let inside = mounts("/var/lib/flexnbd");
    assert_eq!(access("/var/lib/flexnbd/a.img"), ["[Unit]", &inside]);
    let service = |at| format!("ReadWritePaths=\"-{at}\"");
    for (file, at) in [
        ("/srv/disks//./a.img", "/srv/disks"),
        ("/srv/a b\"c\\d%e/a.img", "/srv/a b\\\"c\\\\d%%e"),
        ("/var/lib/flexnbd.old/a.img", "/var/lib/flexnbd.old"),
        ("/a.img", "/a.img"),
        ("/dev/shm/a.img", "/dev/shm"),
    ] {
        assert_eq!(access(file), ["[Unit]", &mounts(at), "[Service]", &service(at)], "{file}");
    }
}

#[test]
fn service_sees_only_the_images_directory_below_home() {
    for at in ["/home/u/disks", "/root", "/run/user/7"] {
        let (writable, bound) =
            (format!("ReadWritePaths=\"-{at}\""), format!("BindPaths=\"-{at}\""));
        let lines = access(&format!("{at}/a.img"));
        assert_eq!(lines[3..], [&*writable, "ProtectHome=tmpfs", &*bound], "{at}");
    }
    assert!(!access("/homeless/a.img").iter().any(|line| line.contains("ProtectHome")));
}

#[test]
fn image_in_tmp_disables_private_tmp() {
    for file in ["/tmp/a.img", "/var/tmp/x/a.img"] {
        assert_eq!(access(file).last().map(String::as_str), Some("PrivateTmp=no"), "{file}");
    }
}

#[test]
fn path_below_dev_is_a_block_device() {
    let expected = [
        "[Unit]",
        "After=dev-vg-my\\x2ddisk.device",
        "[Service]",
        "PrivateDevices=no",
        "DeviceAllow=\"/dev/vg/my-disk\" rw",
        "PrivateUsers=no",
        "SupplementaryGroups=disk",
    ];
    assert_eq!(access("/dev/vg/my-disk"), expected);
}

#[test]
fn receiver_may_write_a_read_only_device() {
    let generated = generate_from("FILE=/dev/sdz\nREAD_ONLY=yes");
    assert!(settings(&generated, SERVICE).contains(&"DeviceAllow=\"/dev/sdz\" r"));
    assert!(settings(&generated, RECEIVER).contains(&"DeviceAllow=\"/dev/sdz\" rw"));
}

#[test]
fn path_that_no_unit_can_express_is_an_error() {
    for (file, why) in [
        ("FILE=/srv/../a", "FILE: /srv/../a: a path with .. in it cannot be in a unit"),
        ("FILE=a.img", "FILE: a.img: a path in a unit begins with /"),
        ("FILE=/srv/\u{1}/a", "such characters cannot be in a unit"),
        ("", "there is no FILE="),
    ] {
        let generated = generate_from(&format!("ADDR=::\nPORT=7\n{file}"));
        assert!(generated.error.unwrap().ends_with(why), "{why}");
        let sockets = [PROXY_SOCKET, SOCKET];
        let written = if file.is_empty() { &sockets[..] } else { &sockets[1..] };
        assert_eq!(generated.files.keys().collect::<Vec<_>>(), written, "{file}");
    }
}

#[test]
fn fd_store_grows_with_max_clients() {
    let generated = |clients| generate_from(&format!("FILE={STATE}/a\nMAX_CLIENTS={clients}"));
    assert!(
        !generated(1024).files[SERVICE].contains("[Service]"),
        "the limits of the unit suffice"
    );
    let generated = generated(1025);
    let expected = ["FileDescriptorStoreMax=1026", "Environment=FDSTORE=1026", "TasksMax=1089"];
    assert_eq!(settings(&generated, SERVICE)[3..], expected);
    assert!(!generated.files[RECEIVER].contains("[Service]"), "the receiver stores no sessions");
}

#[test]
fn acl_becomes_an_ip_filter_only_with_ip_filter() {
    let filter = |text| {
        let generated = generate_from(&format!("FILE=/a\n{text}"));
        settings(&generated, SOCKET).join(" ")
    };
    assert_eq!(filter("ACL=::1"), "");
    assert_eq!(filter("IP_FILTER=yes"), "[Socket] IPAddressDeny=any IPAddressAllow=any");
    assert_eq!(filter("IP_FILTER=yes\nDEFAULT_DENY=yes"), "[Socket] IPAddressDeny=any");
    let expected = "[Socket] IPAddressDeny=any IPAddressAllow=192.0.2.0/24 IPAddressAllow=::1/128";
    assert_eq!(filter("IP_FILTER=yes\nACL=::ffff:192.0.2.7/120 ::1"), expected);
}

#[test]
fn autostart_wants_the_service_or_its_sockets() {
    let links = |autostart| {
        let mut links = generate_from(&format!("FILE=/a\nAUTOSTART={autostart}")).links;
        assert!(links.remove(&device_link("disk").0).is_some());
        links
    };
    let link = |path: &str, to: &str| (path.to_owned(), format!("/usr/lib/systemd/system/{to}"));
    let sockets = [
        link("sockets.target.wants/flexnbd@disk.socket", "flexnbd@.socket"),
        link("sockets.target.wants/flexnbd-control@disk.socket", "flexnbd-control@.socket"),
    ];
    let service = link("multi-user.target.wants/flexnbd@disk.service", "flexnbd@.service");
    assert_eq!(links("no"), BTreeMap::new());
    assert_eq!(links("on-demand"), BTreeMap::from(sockets.clone()));
    let all = sockets.into_iter().chain([service]).collect();
    assert_eq!(links("yes"), all);
}

#[test]
fn an_upstream_makes_units_of_a_proxy() {
    let text = "TO=nbd://192.0.2.1 nbd://192.0.2.2\nADDR=::\nPORT=7\nAUTOSTART=yes\n";
    let generated = generate_from(text);
    assert_eq!(generated.error, None);
    assert_eq!(generated.files.keys().collect::<Vec<_>>(), [ATTACH, PROXY_SOCKET]);
    assert_eq!(settings(&generated, PROXY_SOCKET)[2], "ListenStream=[::]:7");
    assert_eq!(settings(&generated, ATTACH)[1], "Requires=flexnbd-proxy@disk.socket");
    let links: Vec<&str> = generated.links.values().map(String::as_str).collect();
    let units = ["attach@.service", "proxy@.service", "proxy-control@.socket", "proxy@.socket"];
    assert_eq!(links, units.map(|unit| format!("/usr/lib/systemd/system/flexnbd-{unit}")));
    let many = generate_from("TO=nbd://a\nMAX_CLIENTS=1025");
    let expected = ["FileDescriptorStoreMax=1026", "Environment=FDSTORE=1026", "TasksMax=1089"];
    assert_eq!(settings(&many, PROXY)[1..], expected);
}

#[test]
fn proxy_sees_the_directories_of_the_upstreams_sockets() {
    let access = |path: &str| {
        let generated = generate_from(&format!("TO=nbd+unix:///?socket={path}"));
        assert_eq!(generated.error, None, "{path}");
        settings(&generated, PROXY).join(" ")
    };
    assert_eq!(access("/run/flexnbd/a"), "[Unit] RequiresMountsFor=\"/run/flexnbd\"");
    assert!(access("/tmp/a").ends_with("[Service] PrivateTmp=no"));
    assert!(access("/home/a/b").ends_with("ProtectHome=tmpfs BindPaths=\"-/home/a\""));
    assert_eq!(access("/a"), "");
    let error = generate_from("TO=nbd+unix:///?socket=a").error.unwrap();
    assert!(error.ends_with("TO: a: a path in a unit begins with /"), "{error}");
}

#[test]
fn image_and_upstream_exclude_each_other() {
    for (text, keys) in
        [("FILE=/a\nTO=nbd://a", "FILE and TO"), ("DIRECT=yes\nBIND=::1", "DIRECT and BIND")]
    {
        let error = generate_from(text).error.unwrap();
        assert!(error.ends_with(&format!("{keys} exclude each other")), "{error}");
    }
}

#[test]
fn an_invalid_upstream_keeps_the_address_of_the_proxy() {
    let generated = generate_from("TO=192.0.2.1\nADDR=::\nPORT=7\n");
    assert_eq!(settings(&generated, PROXY_SOCKET)[2], "ListenStream=[::]:7");
    assert!(generated.error.unwrap().contains("begins neither with nbd://"));
}

#[test]
fn boot_waits_for_the_device_of_an_autostarted_disk() {
    let boot = |text| settings(&generate_from(text), BOOT).join(" ");
    assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=yes"), "[Unit] Wants=dev-sdz.device");
    assert_eq!(boot("FILE=/dev/sdz\nAUTOSTART=on-demand"), "");
    assert_eq!(boot("FILE=/srv/a\nAUTOSTART=yes"), "");
}

#[test]
fn only_valid_unit_names_are_instances() {
    let instance = |name: &str| instance_of(&Path::new("/etc/flexnbd").join(name));
    assert_eq!(instance("a-b_c.d@e.conf"), Some(Ok("a-b_c.d@e".to_owned())));
    for name in ["disk.conf~", "disk.conf.dpkg-old", ".disk.conf", ".conf", "README"] {
        assert_eq!(instance(name), None, "{name}");
    }
    for name in ["a b.conf", "\u{e4}.conf", "a%b.conf"] {
        let why = instance(name).unwrap().unwrap_err();
        assert!(why.contains("letters, digits and : - _ . @ only; skipped"), "{why}");
    }
    let long = instance(&format!("{}.conf", "x".repeat(90))).unwrap().unwrap_err();
    assert!(long.contains("longer than the 89 bytes of a name; skipped"), "{long}");
}

proptest! {
    #[test]
    fn configuration_cannot_inject_settings_into_a_unit(
        path in "/[ -~\u{80}-\u{ff}\t\u{b}\u{85}]{0,30}",
    ) {
        let text = format!("ADDR='{path}'\nFILE='{path}'");
        for line in generate_from(&text).files.values().flat_map(|text| text.lines()) {
            let known = ["# Made by", "[", "ListenStream=", "RequiresMountsFor=\"", "PrivateTmp=no",
                "ReadWritePaths=\"-", "After=", "PrivateDevices=no", "DeviceAllow=\"",
                "PrivateUsers=no", "SupplementaryGroups=disk", "BindPaths=\"-", "ProtectHome=",
                "Requires=flexnbd@", "StopPropagatedFrom=flexnbd@", "Wants=blockdev@", "Before=blockdev@",
                "Environment=SOCKET_UNIT=flexnbd@"];
            prop_assert!(line.is_empty() || known.iter().any(|known| line.starts_with(known)), "{line}");
            prop_assert!(!line.ends_with('\\'), "{line}");
        }
    }
}
