//! `cargo run -p device-model --features serve --example serve -- SOCKET [PROFILE [QUIRK…]]`: serves a
//! software device over vfio-user until it is killed.

use device_model::serve::{ServeOptions, run};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: serve SOCKET [PROFILE [QUIRK…]]")?;
    let profile = arguments.next().unwrap_or_else(|| "mlx5-vf".into());
    let mut options = ServeOptions::new(socket.into(), &profile)?;
    options.quirks = arguments.collect();
    run(&options, |_| ())?;
    Ok(())
}
