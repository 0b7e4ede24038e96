"""The egress policy as a language: model, file, presets, evaluation; no sockets, no kernel."""
