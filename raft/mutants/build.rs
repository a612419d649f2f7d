//! No other package is compiled with this switch.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=esker_break_rules");
}
