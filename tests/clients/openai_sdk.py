"""OpenAI's Python SDK against a running gateway: python openai_sdk.py BASE_URL TOKEN. Exits 0 when all of it behaves as OpenAI's service would."""

import sys

import openai

base, token = sys.argv[1:3]
client = openai.OpenAI(base_url=f"{base}/v1", api_key=token, max_retries=0, timeout=30)


def user(text):
    return [{"role": "user", "content": text}]


# Not streamed.
answer = client.chat.completions.create(model="demo", messages=user("hello"))
assert answer.object == "chat.completion", answer.object
assert answer.choices[0].message.role == "assistant"
whole = answer.choices[0].message.content
assert whole.strip(), "an answer has words"
assert answer.choices[0].finish_reason == "stop", answer.choices[0].finish_reason
assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 0

# Streamed: the same words (the demo model is greedy where no temperature is asked for), then usage.
chunks = list(client.chat.completions.create(model="demo", messages=user("hello"), stream=True, stream_options={"include_usage": True}))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == whole, (text, whole)
assert len({chunk.id for chunk in chunks}) == 1, "one answer has one id"
assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
assert chunks[-1].usage.completion_tokens > 0

# Masked on the way, in both forms.
for stream in (False, True):
    asked = client.chat.completions.create(model="demo", messages=user("what is your email address?"), stream=stream)
    text = asked.choices[0].message.content if not stream else "".join(c.choices[0].delta.content or "" for c in asked if c.choices)
    assert "•••" in text and "@" not in text, text

# A cut by policy is a legal ending, not an exception.
chunks = list(client.chat.completions.create(model="demo", messages=user("tell me a secret"), stream=True))
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "content_filter"
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert "bluebird" not in text.lower(), text

# The limit on tokens.
short = client.chat.completions.create(model="demo", messages=user("tell me a long story about a parcel"), max_tokens=5)
assert short.choices[0].finish_reason == "length", short.choices[0].finish_reason

# Models.
assert any(model.id for model in client.models.list())


# Errors arrive as the SDK's own exceptions, with our code.
def fails(kind, code, call):
    try:
        call()
    except kind as error:
        assert error.code == code, (error.code, code)
        return error
    raise AssertionError(f"expected {kind.__name__}")


wrong = openai.OpenAI(base_url=f"{base}/v1", api_key="hg_wrong", max_retries=0, timeout=30)
fails(openai.AuthenticationError, "unauthenticated", lambda: wrong.chat.completions.create(model="demo", messages=user("hello")))
fails(openai.AuthenticationError, "unauthenticated", lambda: wrong.chat.completions.create(model="demo", messages=user("hello"), stream=True))
fails(openai.BadRequestError, "invalid_request", lambda: client.chat.completions.create(model="demo", messages=[]))
fails(openai.PermissionDeniedError, "policy_denied", lambda: client.chat.completions.create(model="demo", messages=user("tell me about project bluebird")))

print("ok: openai-python", openai.__version__)
