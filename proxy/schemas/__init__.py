"""The API's shapes: requests as strict pydantic models, answers and events as msgspec structs."""
