//! How fast the embedded model is on one core: `cargo run --release -p headgate-slm --example speed`.
#![allow(clippy::print_stdout, reason = "a figure for whoever ran it")]

use std::sync::Arc;

use headgate_slm::{Limits, Message, Role, Slm, Step};
use tokio::time::{Duration, Instant};

fn main() {
    let began = Instant::now();
    let slm = Arc::new(Slm::embedded());
    println!("loaded in {:.1} ms, at most {} KiB a turn", began.elapsed().as_secs_f64() * 1e3, slm.turn_bytes_max() / 1024);
    let story = [Message { role: Role::User, content: "tell me a long story about a parcel".into() }];
    let (mut prompt_tokens, mut answer_tokens) = (0, 0);
    let (mut prompting, mut answering) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..20 {
        let prompt = slm.prompt(&story, 150).expect("a short question fits");
        prompt_tokens += prompt.ids().len();
        let mut generation = slm.generate(prompt, Limits::default());
        let began = Instant::now();
        while generation.step() == Step::Prompted {}
        prompting += began.elapsed();
        let began = Instant::now();
        while !matches!(generation.step(), Step::End(..)) {}
        answering += began.elapsed();
        answer_tokens += generation.answer_ids().len();
    }
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64();
    println!("prompt {:.0} tokens/s, answer {:.0} tokens/s", rate(prompt_tokens, prompting), rate(answer_tokens, answering));
}
