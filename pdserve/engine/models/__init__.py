"""The models: one decoder whose differences between families are data (`pdserve.engine.models.config`)."""
