"""Every situation of docs/reference/situations.md on real tunnels: is the verdict right, and how soon is it there?"""
