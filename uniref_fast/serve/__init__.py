"""HTTP server of edits: the images API of OpenAI over one `uniref_fast.Engine`.

    app = uniref_fast.serve.app.create_app(EditService(engine, ServeConfig(model="builtin")))

`uniref-fast serve` starts it (`uniref_fast.serve.command`). FastAPI, uvicorn, python-multipart and prometheus_client
come with the extra `serve`; only the modules that use them import them.
"""
