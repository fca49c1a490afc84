//! echod
#![allow(dead_code)]
mod check;
mod cli;
mod config;
fn main() {}
