//! `docs/cli.md` is what the commands say of themselves.

use std::fmt::Write;
use std::path::Path;

use clap::CommandFactory;
use vmferry::cli::Cli;

const INTRODUCTION: &str = "# The command line

What `vmferry help COMMAND` says, in one page. It is generated: after a change of the arguments,
`BLESS=1 cargo test -p vmferry --test cli_docs` writes it anew.
";

fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    let mut command = Cli::command().term_width(100);
    command.build();
    add(&mut page, &mut command);
    page
}

fn add(page: &mut String, command: &mut clap::Command) {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name()).to_owned();
    write!(page, "\n## {name}\n\n```text\n").unwrap();
    for line in command.render_long_help().to_string().lines() {
        writeln!(page, "{}", line.trim_end()).unwrap();
    }
    page.push_str("```\n");
    let names: Vec<_> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for sub in names.iter().filter(|name| *name != "help") {
        add(page, command.find_subcommand_mut(sub).unwrap());
    }
}

#[test]
fn the_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
    let page = page();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page, "docs/cli.md is not what the commands say; run this with BLESS=1");
}
