"""Serving: OpenAI's protocols over HTTP and websockets, on the engine. Needs the extra ``serve``."""

from vita_audio.extras import needs_extra

with needs_extra("serve"):
    from vita_audio.serving.app import create_app
    from vita_audio.serving.config import ServeOptions
    from vita_audio.serving.service import Service

__all__ = ["ServeOptions", "Service", "create_app"]
