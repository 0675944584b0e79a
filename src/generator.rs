//! Turns each `/etc/flexnbd/NAME.conf` into drop-ins for the units of instance NAME: see
//! systemd.generator(7). A placeholder, to be replaced within the hour.

fn main() {}
