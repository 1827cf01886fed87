//! `resolve`: the user decides about a guest of which the agents do not know where it is.

use std::io::{IsTerminal, Write};

use vmferry_api::client::{Client, vm_path};
use vmferry_api::{Resolve, VmView};

use crate::failure::Failure;

pub(crate) async fn run(client: &Client, name: &str, how: Resolve, yes: bool) -> Result<(), Failure> {
    let vm: VmView = client.get(&vm_path(name)).await?;
    if !yes {
        eprintln!("{name} is {}{}", vm.state, vm.detail.map_or_else(String::new, |detail| format!(": {detail}")));
        eprintln!("{}", risk(name, how));
        if !std::io::stdin().is_terminal() {
            return Err(Failure::NotConfirmed);
        }
        eprint!("Go on? [y/N] ");
        // What is not shown is asked all the same.
        let _ = std::io::stderr().flush();
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map_err(Failure::Terminal)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err(Failure::NotConfirmed);
        }
    }
    client.tell(&format!("{}/resolve", vm_path(name)), &how).await?;
    println!(
        "{}",
        match how {
            Resolve::KeepHere => {
                format!("{name} goes on here; the other host lets go of it as soon as it can be told")
            }
            Resolve::ItRunsThere => format!("what is left of {name} here goes"),
        }
    );
    Ok(())
}

fn risk(name: &str, how: Resolve) -> String {
    match how {
        Resolve::KeepHere => format!(
            "If {name} runs at the other host at this moment, it will run twice until that host hears of your decision, \
             and two guests that write to one disk destroy it. What it did there since it was handed over is lost.\n\
             Be sure that the other host is off, or that {name} does not run there."
        ),
        Resolve::ItRunsThere => format!(
            "The QEMU here is ended, with all that it has of {name}. If {name} does not run at the other host, it is gone."
        ),
    }
}
