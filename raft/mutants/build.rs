//! Sets the switch that breaks rules, for this package only.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=esker_break_rules");
}
