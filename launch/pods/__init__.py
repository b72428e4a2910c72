"""What runs in Kubernetes: manifests, and the processes of a pod."""
