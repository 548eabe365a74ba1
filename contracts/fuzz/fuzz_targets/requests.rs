//! Whatever a client sends: no panic; what was understood is understood the same when it is written anew.
#![no_main]

use headgate_contracts::{
    Prompt, SessionId, TurnId,
    wire::{chat::TurnRequest, conversation, frames::ClientFrame, openai, problem},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let _ = problem::parse(400, body);
    let _ = std::str::from_utf8(body).map(ClientFrame::parse);
    let _ = conversation::Request::parse(body);
    let _ = TurnRequest::parse(body);
    let Ok(request) = openai::Request::parse(body) else { return };
    let mut prompt = Prompt::new(TurnId::fresh(), SessionId::fresh(), request.messages);
    prompt.settings = request.settings;
    prompt.metadata = request.metadata;
    let sent = openai::encode_request(&prompt, openai::Form::Streamed);
    let again = openai::Request::parse(&sent).expect("what we send is a request");
    assert!(again.messages == prompt.messages && again.settings == prompt.settings);
    let dispatched = conversation::Request::parse(&conversation::encode(&prompt)).expect("what we dispatch is a request");
    assert!(dispatched.messages == prompt.messages && dispatched.settings == prompt.settings);
});
