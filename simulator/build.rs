//! Lets the program's own `getrandom` be found by those who look for it at run time: see
//! `src/entropy.rs`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg=-Wl,--export-dynamic-symbol=getrandom");
}
