"""The connection: channels, calls, streams, and what their failures mean."""
