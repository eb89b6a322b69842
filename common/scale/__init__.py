"""Several engines behind one address, and batches over several, on Ray; needs the extra `scale`.

    Serve's HTTP proxy -> `front`: reads a request -> `router`: chooses by `prefixes` -> `replica`: an engine

A replica is an engine behind the application of `common.serving`, unchanged. The front exists because Serve's proxy
shows a router the headers of a request only, and beginnings are in its body.
"""
