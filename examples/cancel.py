"""Cancel a reply from another thread; the session then serves the next request.

python examples/cancel.py [MODEL.gguf]
"""

import sys
import threading

from edge_speq import EdgeError, Session
from edge_speq.gguf.bundled import MODEL, path

(model,) = sys.argv[1:] or [str(path(MODEL))]

with Session(model, resident="1/2", n_ctx=1024) as session:
    stream = session.stream("Once upon a time", max_tokens=900)
    stop = threading.Timer(0.5, stream.cancel)
    n_pieces = 0
    try:
        for piece in stream:
            if n_pieces == 0:
                stop.start()
            n_pieces += 1
            print(piece, end="", flush=True)
    except EdgeError as error:
        print(f"\n\n{error.message} after {n_pieces} pieces")
    reply = session.create_completion("The old house", max_tokens=16)
    print("next request:", reply["choices"][0]["text"])
