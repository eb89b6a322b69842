"""Several engines behind one address, on Ray Serve; needs the extra `scale`.

    Serve's HTTP proxy -> Front (`front`): reads a request -> PrefixRouter (`router`): chooses -> Replica (`replica`)

A replica is one engine behind the application of `common.serving`, unchanged: what a client may ask and what it gets is
decided there. The front exists because Serve's proxy routes by a request's headers, and beginnings are in its body.
"""
