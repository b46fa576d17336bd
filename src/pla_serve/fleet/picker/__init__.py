"""The endpoint picker: tells an Envoy where each request goes, so that answers pass it by."""
