"""Edit two pictures with OpenAI's client, and follow the progress: client.py FIRST SECOND PROMPT OUT.

BASE_URL is the address of the server; UNIREF_API_KEY is its key, if it asks for one.
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

first, second, prompt, out = sys.argv[1:]
client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key=os.environ.get("UNIREF_API_KEY", "none")
)
events = client.images.edit(
    image=[Path(first), Path(second)], prompt=prompt, stream=True, partial_images=1, extra_body={"seed": 1}
)
for event in events:
    if event.type == "image_edit.progress":
        print(f"step {event.step} of {event.steps}")
    elif event.type == "image_edit.completed":
        Path(out).write_bytes(base64.b64decode(event.b64_json))
        print(f"{out}: {event.size}, {event.usage.total_tokens} tokens, waited {event.seconds_waited} s")
