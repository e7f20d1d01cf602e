"""The models: a file a family, over one decoder; `registry` says which class serves which."""
