"""`layertap explore`: a page in the browser that shows what a served model does with a sentence.

A user of the SDK like any other: it asks a running server over gRPC, and computes with `analysis`. It needs no torch,
and the extra `explore` alone. `app` is the page's HTTP, `views` its numbers, `static/` the page itself.

Rules:
- It listens on loopback, and answers only requests that know the token in its address.
- It logs no request and stores nothing; what it holds in memory is bounded.
- Errors are shown in the words of the SDK.
"""
