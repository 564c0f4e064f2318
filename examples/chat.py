"""Hold a conversation: each reply is written with the messages before it in view.

python examples/chat.py [MODEL.gguf DRAFT.gguf]
"""

import sys

from edge_speq import Session
from edge_speq.gguf.bundled import DRAFT, MODEL, path

model, draft = sys.argv[1:] or [str(path(MODEL)), str(path(DRAFT))]
messages = []

with Session(model, draft=draft, draft_tokens=4, resident="1/2", n_ctx=1024) as session:
    for question in ("Tell me about a fox.", "What did it do next?"):
        print(f"> {question}")
        messages.append({"role": "user", "content": question})
        reply = ""
        for piece in session.stream(messages, max_tokens=48):
            print(piece, end="", flush=True)
            reply += piece
        print("\n")
        messages.append({"role": "assistant", "content": reply})
    speculation = session.stats().speculation
    print(f"{speculation.accepted} of {speculation.drafted} draft tokens accepted")
