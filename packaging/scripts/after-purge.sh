# Everything that the package made is taken away, except what belongs to the operator: databases and their log.
rm -f /etc/systemd/system/*.wants/litefs@*.service
rm -f /etc/systemd/system/*.wants/litefs@*.socket /etc/systemd/system/*.wants/litefs-control@*.socket
rm -rf /run/litefs
# Mount points, if nothing is in them; behind the preload door they are links to the databases.
for dir in /srv/litefs/* /srv/litefs /var/lib/litefs; do
    if [ -d "$dir" ] && [ ! -L "$dir" ]; then
        rmdir --ignore-fail-on-non-empty "$dir"
    fi
done
if [ -d /var/lib/litefs ]; then
    echo "litefs: databases are kept in /var/lib/litefs; remove that directory to delete them" >&2
fi
